"""Distillation of tokens: against its equation, token by token, and as a part of a training run."""

from __future__ import annotations

import argparse
import copy
import csv
from contextlib import nullcontext

import pytest
import scan_cases
import timm
import torch
from cases import METHODS, backbone_names, build, given, images, serves
from test_parameters import ToySlim
from test_svit_adapter import micro
from test_train_imagenet import data, main, refused, result_of, same, torchrun  # noqa: F401 (main and data are fixtures)
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from training_data import words

import tokenzoo
from tokenzoo.core.tokens import Layout, SideData, Tokens, TraceStep, trace_assign
from tokenzoo.maps import ChainMap, FuseMap, KeepMap, MergeMap, ReplaceMap
from tokenzoo.training import TrainStep, token_distillation
from tokenzoo.training.checkpoints import Checkpoints
from tokenzoo.training.losses import PARTS, unused_parameters
from tokenzoo.training.options import build_parser

TARGET = torch.arange(3)


def defaults(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(build_parser().parse_args([])), "kd_token_weight": 0.5, **changes})


def learning(model: nn.Module, recipe: object, teacher: nn.Module | None = None, **changes) -> TrainStep:
    """A step whose teacher is the model before patching, in eval mode (nothing random)."""
    teacher = copy.deepcopy(model) if teacher is None else teacher
    if recipe is not None:
        tokenzoo.patch_model(model, recipe)
    return TrainStep(model, teacher.eval().requires_grad_(False), defaults(**changes)).eval()


def test_scores_of_a_second_classifier():
    """As in DynamicViT's training of LV-ViT: divergences over the tokens that are left, from the teacher's scores."""
    model, teacher = build("lv_vit"), build("lv_vit", seed=5)
    x = images(model)
    found = learning(model, given("topk"), teacher, kd_token_scores=True)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x, trace=True)
    place = torch.arange(17).expand(3, -1)
    for step in tokens.trace:
        place = place.gather(1, step.map.heads)
    said = teacher.aux_head(teacher.forward_features(x)).softmax(2)
    terms = []
    for image in range(3):
        for slot in range(1, tokens.length):
            wanted, own = said[image, place[image, slot]], model.aux_head(tokens.x)[image, slot].softmax(0)
            terms.append((wanted * (wanted.log() - own.log())).sum().item())
    assert found.item() == pytest.approx(mean_of(terms), rel=1e-4)
    with pytest.raises(ValueError, match="VisionTransformer, the student, needs an aux_head"):
        learning(build("deit"), given("topk"), kd_token_scores=True)
    with pytest.raises(ValueError, match="--kd-token-weight a weight"):
        learning(build("lv_vit"), given("topk"), kd_token_scores=True, kd_token_weight=0.0)


# ---- the equation


def members(tokens: Tokens) -> list[list[list[int]]]:
    """Patches that every final token stands for, image by image, through one index after the other."""
    assign = trace_assign(tokens.trace, tokens.x.shape[0], 17, tokens.x.device)
    return [[[i for i in range(17) if row[i] == slot] for slot in range(tokens.x.shape[1])] for row in assign.tolist()]


def mean_of(terms: list[float]) -> float:
    return sum(terms) / len(terms)


@pytest.mark.parametrize("method", ["topk", "tome", "ats"])
def test_equals_the_equation(method):
    """Kept tokens and plain means of merged ones; padding of images that keep fewer tokens does not count."""
    model, teacher = build("deit").double(), build("deit", seed=5).double()
    x = images(model).double()
    tokens_there = teacher.forward_features(x).tolist()
    loss = learning(model, given(method), teacher)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x, trace=True)
    terms = []
    for image, groups in enumerate(members(tokens)):
        for slot, group in enumerate(groups):
            if slot == 0 or (tokens.valid is not None and not tokens.valid[image, slot]):
                continue
            assert group and 0 not in group
            for channel in range(32):
                wanted = mean_of([tokens_there[image][i][channel] for i in group])
                terms.append((tokens.x[image, slot, channel].item() - wanted) ** 2)
    if method == "ats":
        assert not tokens.valid.all()
    assert len(terms) < 3 * 16 * 32
    assert loss.item() == pytest.approx(mean_of(terms), rel=1e-10)


def test_fused_tokens_are_compared_with_what_they_stand_for():
    model, teacher = build("deit").double(), build("deit", seed=5).double()
    x = images(model).double()
    there = teacher.forward_features(x)
    loss = learning(model, "evit", teacher)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x, trace=True)
    terms = []
    for image in range(3):
        rows: list[Tensor] = list(there[image])
        for step in tokens.trace:
            fuse: FuseMap = step.map
            weights = fuse.weight[image].tolist()
            fused = sum(w * row for w, row in zip(weights, rows)) / sum(weights)
            rows = [*(rows[i] for i in fuse.idx[image].tolist()), fused]
        assert len(rows) == tokens.x.shape[1] and 0.9 > sum(weights) > 0
        terms += [(tokens.x[image, i] - rows[i]).square().mean().item() for i in range(1, len(rows))]
    assert loss.item() == pytest.approx(mean_of(terms), rel=1e-10)


def test_shared_patches_are_compared_with_the_patches_they_cover():
    model, teacher = build("deit").double(), build("deit", seed=5).double()
    x = images(model).double()
    there = teacher.forward_features(x)
    loss = learning(model, given("cts"), teacher)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x, trace=True)
    assert [type(step.map) for step in tokens.trace] == [ReplaceMap]
    terms = [
        (tokens.x[image, slot] - there[image, group].mean(0)).square().mean().item()
        for image, groups in enumerate(members(tokens)) for slot, group in enumerate(groups) if slot
    ]  # fmt: skip
    assert sorted(len(group) for group in members(tokens)[0][1:]) == [1] * 8 + [4] * 2
    assert loss.item() == pytest.approx(mean_of(terms), rel=1e-10)


def test_small_numbers_by_hand():
    """Two images of three patches and a class token; one token of the second image is padding."""
    layout = Layout(1, True, (1, 3))
    side = SideData(None, None, None, None, None)

    def traced(x: list, token_map, valid=None) -> Tokens:
        step = TraceStep(0, "by hand", token_map, None, side, 1)
        return Tokens(torch.tensor(x).float(), layout, valid=valid, trace=(step,))

    there = torch.tensor([[[1.0], [2.0], [4.0]], [[8.0], [16.0], [32.0]]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    keep = KeepMap(torch.tensor([[0, 3, 1], [0, 2, 0]]), 4, valid)
    kept = traced([[[9], [4], [0]], [[9], [13], [0]]], keep, valid)
    assert token_distillation(kept, there).item() == pytest.approx((0 + 1 + 9) / 3)
    order, src, slot = torch.tensor([[0, 1]] * 2), torch.tensor([[2, 3]] * 2), torch.tensor([[1, 1]] * 2)
    weight = torch.tensor([[[1.0], [1], [2], [1]], [[1], [1], [0], [3]]])
    means = [(1 + 4 + 4) / 4, (8 + 96) / 4]
    for reduce, wanted in (("mean", means), ("sum", [7 / 3, 56 / 3]), ("max", [4, 32])):
        merged = traced([[[9], [0]], [[9], [0]]], MergeMap(order, src, slot, 4, weight, reduce))
        assert token_distillation(merged, there).item() == pytest.approx(sum(w * w for w in wanted) / 2), reduce
    both = traced([[[9], [0]]] * 2, ChainMap(keep, KeepMap(torch.tensor([[0, 1]] * 2), 3)))
    assert token_distillation(both, there).item() == pytest.approx((16 + 256) / 2)
    nobody = torch.tensor([[True, False, False]] * 2)
    none = traced([[[9], [0], [0]]] * 2, KeepMap(torch.tensor([[0, 1, 2]] * 2), 4, nobody), nobody)
    assert token_distillation(none, there).item() == 0


# ---- every method, every kind of model


@pytest.mark.parametrize("backbone", sorted({"deit", "gap", "distilled", "dinov3", "lv_vit"} & set(backbone_names())))
def test_zero_without_reduction(backbone):
    """A method that takes nothing away leaves the teacher's tokens, to the last bit; a reducing one does not."""
    x = images(build(backbone))
    assert learning(build(backbone), None)(x, TARGET)["token_distillation"].item() == 0
    for method in METHODS:
        if serves(method, build(backbone)):
            assert learning(build(backbone), given(method, "zero"))(x, TARGET)["token_distillation"].item() == 0, method
            loss = learning(build(backbone), given(method))(x, TARGET)["token_distillation"]
            assert loss.isfinite() and loss > 1e-6, method


@pytest.mark.parametrize("name", ["vim", "vim_both", "vim_none", "plain_mamba"])
def test_models_that_scan(name):
    """Class tokens in the middle or at the ends of the teacher's sequence are left out, too."""
    x = images(scan_cases.build(name))
    assert learning(scan_cases.build(name), None)(x, TARGET)["token_distillation"].item() == 0
    for method in ("tome", "ssm_prune"):
        for kind in ("zero", "reduce"):
            loss = learning(scan_cases.build(name), scan_cases.given(method, kind))(x, TARGET)["token_distillation"]
            assert (loss.item() == 0) == (kind == "zero") and loss.isfinite(), (method, kind)
    model, teacher = scan_cases.build(name).double(), scan_cases.build(name, seed=3).double()
    x, rows = x.double(), tokenzoo.apply.patch.describe(model).layout.scan_rows
    there = teacher.forward_features(x)
    there = there[:, [i for i in range(there.shape[1]) if i not in rows]]
    loss = learning(model, "uniform", teacher, kd_weight=0.0)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x)
    place = tokens.positions[:, len(rows) :] - len(rows)
    apart = tokens.x[:, len(rows) :] - there.gather(1, place.unsqueeze(-1).expand(-1, -1, 24))
    assert loss.item() == pytest.approx(apart.square().mean().item(), rel=1e-10)


def test_models_in_stages():
    """SViT: the last stage counts, whatever the one before took away."""
    x = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert learning(micro(), None)(x, TARGET)["token_distillation"].item() == 0
    assert learning(micro(), {"method": "tome", "r": 0})(x, TARGET)["token_distillation"].item() == 0
    for method in ("tome", "evit", "topk", "pool"):
        loss = learning(micro(), given(method))(x, TARGET)["token_distillation"]
        assert loss.isfinite() and loss > 0, method


def test_tokens_that_come_back_are_all_compared():
    """A span that is rebuilt, and merging around a branch, leave all tokens in their places."""
    for method in ("reconstruct", "tomesd", "sta"):
        model, teacher = build("deit"), build("deit", seed=5)
        x = images(model)
        loss = learning(model, given(method), teacher)(x, TARGET)["token_distillation"]
        tokens = model.forward_tokens(x, trace=True)
        assert tokens.length == 17 and tokens.trace == ()
        apart = (tokens.x - teacher.forward_features(x))[:, 1:]
        torch.testing.assert_close(loss, apart.square().mean())


def test_learned_mixes_take_the_teacher_as_it_is():
    model, teacher = build("deit").double(), build("deit", seed=5).double()
    x = images(model).double()
    loss = learning(model, ToySlim(layers=(1,)), teacher)(x, TARGET)["token_distillation"]
    tokens = model.forward_tokens(x, trace=True)
    mixed = tokens.trace[0].map.matrix() @ teacher.forward_features(x)
    torch.testing.assert_close(loss, (tokens.x - mixed)[:, 1:].square().mean())


@pytest.mark.parametrize("method", ["evit", "tome", "mctf", "ats"])
def test_gradients_reach_the_student_alone(method):
    model = build("deit")
    step = learning(model, given(method))
    teacher = step._teacher[0]
    for p in teacher.parameters():
        p.requires_grad_(True)  # not even where it could learn
    step(images(model), TARGET)["token_distillation"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == ["head.weight", "head.bias"]
    tokens = model.forward_tokens(images(model), trace=True)
    x = tokens.x.detach().requires_grad_(True)
    token_distillation(tokens._replace(x=x), torch.zeros(3, 16, 32)).backward()
    assert not token_distillation(tokens._replace(x=x.detach()), torch.zeros(3, 16, 32)).requires_grad
    assert not x.grad[:, 0].any() and x.grad[:, 1:].any()  # through the values alone, not those of class tokens
    assert tokens.valid is None or not x.grad[~tokens.valid].any()


# ---- as a part of the loss


def test_the_loss_is_the_weighted_sum():
    x = images(build("deit"))
    with_both = learning(build("deit"), "topk", build("deit", seed=5))
    losses = with_both(x, TARGET)
    assert with_both.parts == ("task", "distillation", "token_distillation") and set(with_both.parts) < set(PARTS)
    total = losses["task"] + 0.5 * losses["distillation"] + 0.5 * losses["token_distillation"]
    torch.testing.assert_close(losses["loss"], total)
    alone = learning(build("deit"), "topk", build("deit", seed=5), kd_weight=0.0, kd_token_weight=2.0)
    assert alone.parts == ("task", "token_distillation")
    torch.testing.assert_close(alone(x, TARGET)["loss"], losses["task"] + 2 * losses["token_distillation"])
    without = learning(build("deit"), "topk", build("deit", seed=5), kd_token_weight=0.0)
    assert set(without(x, TARGET)) == {"loss", "task", "distillation"}
    torch.testing.assert_close(without(x, TARGET)["distillation"], losses["distillation"], rtol=0, atol=0)


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_with_consistency_and_recomputed_blocks(amp):
    model = build("deit")
    model.set_grad_checkpointing(True)
    step = learning(model, {"method": "mctf", "r": 3, "min_tokens": 4}, consistency=3.0).train()
    batch = images(model), TARGET
    context = nullcontext() if amp is None else torch.autocast("cpu", amp)
    assert unused_parameters(step, batch, context) == []
    with nullcontext() if amp is None else torch.autocast("cpu", amp):
        losses = step(*batch)
    assert set(losses) == {"loss", *PARTS} and all(value.isfinite() for value in losses.values())
    assert losses["token_distillation"].dtype == torch.float32
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    plain = learning(build("deit"), {"method": "mctf", "r": 3, "min_tokens": 4}).train()(*batch)
    close = 1e-5 if amp is None else 0.05
    torch.testing.assert_close(losses["token_distillation"], plain["token_distillation"], rtol=close, atol=close)


@pytest.mark.parametrize("method", [None, "evit", "tome", "ats", "mctf", "cts"])
def test_compiled_in_one_graph(method, monkeypatch):
    recipe = None if method is None else given(method, "static")
    torch._dynamo.reset()
    model = build("deit")
    x, graphs = images(model), []
    whole = not torch.__version__.startswith("2.6.")  # that compiler cannot trace named tuples
    expected = learning(copy.deepcopy(model), recipe)(x, TARGET)
    compiled = torch.compile

    def counted(function):
        return compiled(
            function, fullgraph=whole, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph
        )

    monkeypatch.setattr(torch, "compile", counted)
    step = learning(model, recipe, torchcompile=True)
    for _ in range(2):
        losses = step(x, TARGET)
    assert len(graphs) == 1 or not whole
    torch.testing.assert_close(losses["loss"], expected["loss"])
    torch.testing.assert_close(losses["token_distillation"], expected["token_distillation"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()


def test_teachers_that_do_not_fit():
    def step(teacher, model=None, recipe="topk"):
        model = build("deit") if model is None else model
        return learning(model, recipe, teacher)(images(model), TARGET)

    with pytest.raises(ValueError, match="--kd-token-weight 0.5 needs a teacher; give --kd-model-name"):
        TrainStep(build("deit"), None, defaults())
    wide = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2, num_classes=7)
    with pytest.raises(ValueError, match="16 patches of 32 channels and the teacher 16 of 48; give a teacher"):
        step(wide)
    fine = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=7)
    with pytest.raises(ValueError, match="--kd-token-weight .* 16 patches of 32 channels and the teacher 64 of 32"):
        step(fine)
    with pytest.raises(ValueError, match="ResNet, the teacher, cannot be used with --kd-token-weight: .* not a back"):
        step(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="ResNet, the student, cannot be used"):
        learning(timm.create_model("resnet10t"), None, build("deit"))
    sam = VisionTransformerSAM(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, neck_chans=32)
    with pytest.raises(ValueError, match="VisionTransformerSAM, the teacher, .* a neck mixes its tokens"):
        step(sam)
    # other prefix tokens are none of its business
    registers = build("registers")
    losses = step(registers)
    model = build("deit")
    tokenzoo.patch_model(model, "topk")
    tokens = model.forward_tokens(images(model), trace=True)
    torch.testing.assert_close(
        losses["token_distillation"], token_distillation(tokens, registers.forward_features(images(model))[:, 5:])
    )


# ---- from the command line


RUN = ["--epochs", "2", "--kd-model-name", "unpatched", "--kd-token-weight", "0.25"]


def test_a_run(main, data, tmp_path, capsys):  # noqa: F811
    more = [*RUN, "--method", "evit", "--shrink-start-epoch", "1", "--shrink-epochs", "1"]
    assert main(words(data, tmp_path, *more)) == 0, capsys.readouterr().err
    result = result_of(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    for row in rows:
        total = sum(float(row[f"train_{part}"]) * w for part, w in (
            ("task", 1), ("distillation", 0.5), ("token_distillation", 0.25)))  # fmt: skip
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
        assert row["train_consistency"] == ""
    assert result["train_token_distillation"] > 0 and result["without_gradient"] == []
    (tmp_path / "model.safetensors").rename(tmp_path / "whole.safetensors")
    newest = Checkpoints(tmp_path).list()[0][1]
    newest.unlink()
    assert main(words(data, tmp_path, *more, "--resume", "--kd-token-weight", "1")) == 2
    assert "--kd-token-weight: 0.25 before, 1.0 now" in capsys.readouterr().err
    assert main(words(data, tmp_path, *more, "--resume")) == 0
    same(tmp_path / "whole.safetensors", tmp_path / "model.safetensors")


def test_everything_at_once(main, data, tmp_path, capsys):  # noqa: F811
    more = ["--method", "mctf", "--method-kwargs", "r=3", "min_tokens=4", "--consistency", "3", "--kd-weight", "0"]
    more += ["--amp", "--mixup", "0.8", "--grad-accum-steps", "2", "--drop-path", "0.1", "--grad-checkpointing"]
    assert main(words(data, tmp_path, *RUN, *more)) == 0, capsys.readouterr().err
    result = result_of(capsys.readouterr().out)
    parts = ("task", "second_task", "consistency", "token_distillation")
    total = sum(w * result[f"train_{part}"] for part, w in zip(parts, (1, 1, 3, 0.25)))
    assert result["train_loss"] == pytest.approx(total, rel=1e-4) and result["train_distillation"] == ""


def test_refused_options(main, data, tmp_path, capsys):  # noqa: F811
    for more, expected in (
        (["--kd-token-weight", "0.5"], "compares tokens with those of a teacher; give --kd-model-name unpatched"),
        ([*RUN, "--kd-token-weight", "-1"], "--kd-token-weight -1.0; give 0 or more"),
        (
            [*RUN, "--kd-model-name", "deit_tiny_patch16_224", "--img-size", "32"],
            "48 channels and the teacher 4 of 192",
        ),
        ([*RUN, "--kd-model-name", "resnet10t"], "ResNet, the teacher, cannot be used with --kd-token-weight"),
    ):
        assert expected in refused(main, capsys, words(data, tmp_path / "o", *more))


def test_checkpoints_from_before_the_flag(main, data, tmp_path, capsys):  # noqa: F811
    """A flag that a checkpoint does not know stands for its default, and the loss had a part less."""
    more = ["--epochs", "1", "--method", "topk", "--recovery-interval", "2", "--checkpoint-hist", "9"]
    assert main(words(data, tmp_path, *more)) == 0
    (tmp_path / "model.safetensors").rename(tmp_path / "whole.safetensors")
    loss = result_of(capsys.readouterr().out)["train_loss"]
    checkpoints = Checkpoints(tmp_path, 9)
    for _, path in checkpoints.list()[:-1]:
        path.unlink()
    place, state = checkpoints.load()
    assert place.batch == 2 and state["settings"].pop("kd_token_weight") == 0
    state["sums"] = state["sums"][:-1]
    checkpoints.save(place, state)
    assert main(words(data, tmp_path, *more, "--resume", "--kd-model-name", "unpatched", "--kd-token-weight", "1")) == 2
    assert "--kd-token-weight: 0.0 before, 1.0 now" in capsys.readouterr().err
    assert main(words(data, tmp_path, *more, "--resume")) == 0
    same(tmp_path / "whole.safetensors", tmp_path / "model.safetensors")
    assert result_of(capsys.readouterr().out)["train_loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.slow
def test_two_processes(main, data, tmp_path, capsys):  # noqa: F811
    more = [*RUN, "--method", "evit", "--opt", "sgd", "--lr", "0.05"]
    assert main(words(data, tmp_path / "one", *more, "--batch-size", "10")) == 0
    one = result_of(capsys.readouterr().out)
    two = torchrun(words(data, tmp_path / "two", *more, "--batch-size", "5"))
    assert two["train_token_distillation"] == pytest.approx(one["train_token_distillation"], abs=1e-5)
    same(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors", atol=1e-5)
