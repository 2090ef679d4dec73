"""Registers on a ViT without any: what they leave alone, what undoes them, and how a denoised teacher trains them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from cases import EVA, EVERY, build, given, images
from safetensors.torch import load_file
from test_train_imagenet import data, main  # noqa: F401 (fixtures)
from training_data import words

import tokenzoo
from tokenzoo.ops.views import draw_views
from tokenzoo.training import parse_options
from tokenzoo.training.build import build as build_run
from tokenzoo.training.losses import TrainStep
from tokenzoo.training.token_distillation import full_layout, patch_tokens
from tokenzoo.training.viewing import self_distillation, viewed_tokens

TIMM = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
OPTIONS = [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]


def vit(**options):
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**SMALL, **options).eval()


def picture(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hidden_registers_change_nothing(options):
    model, x = vit(**options), picture()
    before = model.forward_features(x)
    logits, old = model(x), model.num_prefix_tokens
    tokenzoo.add_registers(model, 3)
    assert model.num_prefix_tokens == old + 3 and model.forward_features(x).shape[1] == before.shape[1] + 3
    assert not torch.allclose(model(x), logits)  # seen, they have an effect at once
    seen = torch.ones(before.shape[1] + 3, dtype=torch.bool)
    seen[old : old + 3] = False
    mask = seen.view(1, 1, 1, -1).expand(1, 1, len(seen), -1)
    found = model.forward_features(x, attn_mask=mask)
    torch.testing.assert_close(found[:, seen], before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward_head(found), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_taken_off_the_model_is_what_it_was(options):
    model, x = vit(**options), picture()
    before, logits = copy.deepcopy(model.state_dict()), model(x)
    tokenzoo.remove_registers(tokenzoo.add_registers(model, 2))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), logits)


def test_weights_fit_what_timm_creates_with_registers(tmp_path):
    model = tokenzoo.add_registers(timm.create_model(TIMM, num_classes=3).eval(), 4)
    x = torch.randn(1, 3, 224, 224)
    tokenzoo.patch_model(model, "evit", keep_rate=0.7)
    tokenzoo.save(model, tmp_path / "model", TIMM, num_classes=3, reg_tokens=4)
    loaded = tokenzoo.load(tmp_path / "model")
    assert torch.equal(loaded(x), model(x)) and tokenzoo.recipe(loaded) == tokenzoo.recipe(model)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_takes_them_as_prefix(method):
    model = tokenzoo.add_registers(build("deit"), 2)
    x = images(model)
    plain, features = model(x), model.num_prefix_tokens
    tokenzoo.patch_model(model, given(method, "zero"))
    if method != "thresholds":  # which learns what removes nothing
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, given(method))
    tokens = model.forward_tokens(x)
    assert tokens.layout.num_prefix == features and model(x).isfinite().all()
    tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain)


def test_refusals():
    with pytest.raises(TypeError, match="Eva.*cannot be given register tokens"):
        tokenzoo.add_registers(EVA(), 2)
    for n in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="give a whole number from 1 on"):
            tokenzoo.add_registers(vit(), n)
    with pytest.raises(ValueError, match="has 2 register tokens already"):
        tokenzoo.add_registers(vit(reg_tokens=2), 2)
    with pytest.raises(ValueError, match="no register tokens; there is nothing"):
        tokenzoo.remove_registers(vit())
    with pytest.raises(ValueError, match="is patched; call tokenzoo.unpatch_model first"):
        tokenzoo.add_registers(tokenzoo.patch_model(vit(), "tome", r=1), 2)
    with pytest.raises(ValueError, match="pool_include_prefix"):
        tokenzoo.add_registers(vit(global_pool="avg", class_token=False, pool_include_prefix=True), 1)
    with pytest.raises(ValueError, match="patch_drop"):
        tokenzoo.add_registers(vit(patch_drop_rate=0.5), 1)
    with pytest.raises(ValueError, match="no position embedding"):
        tokenzoo.add_registers(vit(pos_embed="none", class_token=False, global_pool="avg"), 1)


# ---- views and the teacher


def slow_target(teacher, x, views, fill):
    """Views pixel by pixel and patch by patch, in float64."""
    (high, wide), side = views.grid, x.shape[2] // views.grid[0]
    total = torch.zeros(len(x), high, wide, 32, dtype=torch.float64)
    count = torch.zeros(len(x), high, wide, 1, dtype=torch.float64)
    for image in range(len(x)):
        for view in range(views.count):
            dy, dx = views.offsets[image, view].tolist()
            seen = torch.tensor(fill, dtype=torch.float64).view(1, 3, 1, 1).repeat(1, 1, *x.shape[2:])
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    r, c = row + dy * side, column + dx * side
                    if 0 <= r < x.shape[2] and 0 <= c < x.shape[3]:
                        seen[0, :, row, column] = x[image, :, r, c]
            flip = bool(views.flips[image, view])
            said = teacher.forward_features(seen.flip(3) if flip else seen)[0, 1:].view(high, wide, -1)
            said = said.flip(1) if flip else said
            for row in range(high):
                for column in range(wide):
                    if 0 <= row + dy < high and 0 <= column + dx < wide:
                        total[image, row + dy, column + dx] += said[row, column]
                        count[image, row + dy, column + dx] += 1
    return (total / count).flatten(1, 2)


@torch.no_grad()
def test_denoised_teacher_is_the_slow_one():
    teacher, x = vit().double(), picture().double()
    views = draw_views(2, (4, 4), 4, 0.4, torch.Generator().manual_seed(2))
    assert views.flips.any() and views.offsets.abs().max() > 0
    found = viewed_tokens(teacher, x, views, (0.5, 0.2, -0.1))
    torch.testing.assert_close(found, slow_target(teacher, x, views, (0.5, 0.2, -0.1)), atol=1e-9, rtol=1e-9)
    one = draw_views(2, (4, 4), 1)
    plain = patch_tokens(teacher.forward_features(x), full_layout(teacher, x))
    assert torch.equal(viewed_tokens(teacher, x, one), plain)


def test_properties_of_views():
    views = draw_views(3, (4, 6), 5, 0.4, torch.Generator().manual_seed(3))
    assert not views.offsets[:, 0].any() and not views.flips[:, 0].any()
    assert views.offsets[..., 0].abs().max() <= 2 and views.offsets[..., 1].abs().max() <= 2
    constant = torch.full((3, 24, 5), 0.7)
    torch.testing.assert_close(views.average([constant] * 5), constant)
    again = draw_views(3, (4, 6), 5, 0.4, torch.Generator().manual_seed(3))
    assert torch.equal(again.offsets, views.offsets) and torch.equal(again.flips, views.flips)
    with pytest.raises(ValueError, match="give images of whole patches"):
        views.images(torch.zeros(3, 3, 17, 24), 0)
    with pytest.raises(ValueError, match="give 1 or more"):
        draw_views(1, (4, 4), 0)
    with pytest.raises(ValueError, match="without prefix tokens"):
        self_distillation(torch.zeros(1, 5, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="draw views for that grid"):
        viewed_tokens(vit(), picture(3), views)


# ---- the trainer

FLAGS = (
    "--registers", "2", "--kd-model-name", "unpatched", "--kd-weight", "0", "--kd-token-weight", "1",
    "--kd-token-loss", "cosine_squares", "--kd-views", "3", "--kd-shift", "0.4", "--task-weight", "0",
    "--train-only", "reg_token", "pos_embed", "patch_embed.proj", "blocks.1.",
)  # fmt: skip
TINY = ("--model", TIMM, "--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")


def options(tmp_path, *flags):
    return parse_options(words(tmp_path, tmp_path, *TINY, *(flags or FLAGS)))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_two_steps_reach_what_learns_and_nothing_else(tmp_path, kind):
    args = options(tmp_path)
    built = build_run(args, 4, torch.device("cpu"))
    assert built.teacher.reg_token is None and built.model.num_reg_tokens == 2
    step = TrainStep(built.model, built.teacher, args).train()
    before = copy.deepcopy(built.model.state_dict())
    learning = [name for name, p in built.model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad], lr=0.1)
    reached = set()
    for update in range(2):
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            losses = step(picture(), torch.tensor([0, 1]), update)
        losses["loss"].backward()
        reached |= {n for n, p in built.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert reached == set(learning) and "reg_token" in learning
    changed = {key for key, value in built.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(learning)


def test_the_loss_is_that_of_the_recipe(tmp_path):
    args = options(tmp_path)
    built = build_run(args, 4, torch.device("cpu"))
    step, x = TrainStep(built.model, built.teacher, args).eval(), picture()
    teaching, layout = step._taught(x, 5)
    tokens = patch_tokens(built.model.forward_features(x), layout)
    expected = self_distillation(tokens, teaching.tokens)
    found = step(x, torch.tensor([0, 1]), 5)
    torch.testing.assert_close(found["loss"], expected["cosine"] + expected["mse"])
    assert torch.equal(step._taught(x, 5)[0].tokens, teaching.tokens)
    assert not torch.equal(step._taught(x, 6)[0].tokens, teaching.tokens)


def test_trains_by_command(data, main, tmp_path):  # noqa: F811
    flags = [*TINY, *FLAGS, "--epochs", "1", "--sched", "step", "--decay-epochs", "1", "--decay-rate", "0.9705"]
    folder = tmp_path / "run"
    assert main(words(data, folder, *flags)) in (0, None)
    model = timm.create_model(
        TIMM, num_classes=10, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=2
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    row = (folder / "summary.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "train_token_distillation" in row


def test_flags_that_do_not_go_together(tmp_path):
    for flags, message in (
        (("--task-weight", "0"), "leaves no loss to learn from"),
        (("--kd-views", "4"), "averages the teacher's tokens, which nothing compares with"),
        (("--train-only", "registers"), "--train-only registers: no parameter"),
        (("--kd-shift", "1"), "a share of the patch grid"),
        (("--registers", "-1"), "give 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            args = options(tmp_path, *flags)
            built = build_run(args, 4, torch.device("cpu"))
            TrainStep(built.model, built.teacher, args)
