"""STViT-R: both forms against slow references, what holds by construction, checkpoints, costs, refusals."""

import re
from functools import partial

import pytest
import stvit_reference as slow
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

import tokenzoo
from tokenzoo.models import STViTR, list_models
from tokenzoo.models.stvit.checkpoint import rename_released
from tokenzoo.models.stvit.forms import Whole, Windowed
from tokenzoo.models.stvit.masks import exact_bias, released_bias
from tokenzoo.models.stvit.stage import SemanticStage, semantic_blocks
from tokenzoo.models.stvit.swin import PatchMerging, SwinBlock

DIM, HEADS, EPS = 8, 2, 1e-5
TINY = {"embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 2, 4), "init_values": 0.5, "num_classes": 7}


def shaken(module: nn.Module) -> nn.Module:
    """Weights of which every one counts."""
    for name, p in module.named_parameters():
        nn.init.uniform_(p, 0.5, 1.5) if "scale" in name or "norm" in name else nn.init.normal_(p, std=0.3)
    return module.double().eval()


def stage_of(form, depth=6, prompt=False, shortcut=False) -> SemanticStage:
    blocks = semantic_blocks(DIM, [0.0] * depth, form.window, shortcut, num_heads=HEADS)
    return shaken(SemanticStage(blocks, PatchMerging(DIM), form, DIM if prompt else 0))


def double_map(high, wide, batch=2):
    return torch.randn(batch, high, wide, DIM, dtype=torch.float64)


# ---- against the slow reference


@pytest.mark.parametrize(
    "depth,sample,prompt,shortcut", [(6, 3, True, False), (12, 2, True, True), (6, 4, False, True)]
)
@torch.no_grad()
def test_classification(depth, sample, prompt, shortcut):
    stage, x = stage_of(Whole(7, sample), depth, prompt, shortcut), double_map(14, 14)
    weights = stage.state_dict()
    for image, found, halved in zip(x, stage.run_blocks(x), stage(x)):
        for first in range(0, depth, 6):
            image = slow.unit(weights, first, image, HEADS, EPS, sample, shortcut)
        torch.testing.assert_close(found, image)
        torch.testing.assert_close(halved, slow.halve(slow.below(weights, "downsample"), image, EPS))


@pytest.mark.parametrize("mask", ["released", None, "exact"])
@pytest.mark.parametrize("size,reach", [((10, 13), (14, 21, 27)), ((14, 8), (9, 14, 5)), ((5, 21), (14, 21, 9))])
@torch.no_grad()
def test_dense(size, reach, mask):
    form, x = Windowed(7, 3, reach, mask), double_map(*size)
    blocks = [shaken(block) for block in semantic_blocks(DIM, [0.0] * 6, 7, True, num_heads=HEADS)]
    places = form.places(size, x)
    first = form.generate(blocks[1], x, places)
    second = form.refine(blocks[2], first, x, places, None)
    found = form.restore(blocks[5], x, second, places)
    parts = tuple(blocks[i].state_dict() for i in (1, 2, 5))
    if mask != "exact":
        for image, out in zip(x, found):
            expected = slow.dense_steps(parts, image, HEADS, EPS, 3, reach, mask)[2]
            torch.testing.assert_close(out, expected)
        return
    # padding and what lies outside has no influence as keys: other values there change nothing
    whole = -(-size[0] // 7) * 7, -(-size[1] // 7) * 7
    image = form._biases(size, whole, (whole[0] // 7 * 3, whole[1] // 7 * 3), x)[0]
    inside = torch.zeros(whole, dtype=torch.bool)
    inside[: size[0], : size[1]] = True
    assert torch.equal(image[:-1].isinf().view(whole), ~inside) and image[-1].isinf()
    rows = torch.nn.functional.pad(x, (0, 0, 0, whole[1] - size[1], 0, whole[0] - size[0])).flatten(1, 2)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    changed = rows + image.isinf().double()[:, None] * 9
    torch.testing.assert_close(blocks[1](first, changed, *places.generate), blocks[1](first, rows, *places.generate))
    assert found.isfinite().all()


@pytest.mark.parametrize("size,shift", [((14, 14), 3), ((9, 20), 3), ((10, 9), 0), ((7, 5), 3)])
@torch.no_grad()
def test_swin_block(size, shift):
    block, x = shaken(SwinBlock(DIM, HEADS, 7, shift)), double_map(*size)
    shift = 0 if max(size) <= 7 else shift  # one window is not shifted
    for image, out in zip(x, block(x)):
        torch.testing.assert_close(out, slow.swin(block.state_dict(), image, HEADS, EPS, shift))


def test_masks():
    like = torch.zeros(())
    assert released_bias((3, 3), (1, 2), like).eq(-1000).long().tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert (released_bias((3, 3), (0, 0), like) == -1000).all()  # the slice `-0:`
    starts = torch.tensor([0, 2, 4]), torch.tensor([0, 2])
    assert exact_bias(starts, (3, 9), like).isinf().long().tolist() == [0, 0, 0, 0, 1, 1, 1]


# ---- what holds by construction


@pytest.mark.parametrize("form", [Whole(7, 3), Windowed(7, 3), Windowed(7, 3, mask="exact")])
@torch.no_grad()
def test_identities(form):
    stage, x = stage_of(form), double_map(14, 14)
    places = form.places((14, 14), x)
    for block in stage.blocks[1:]:
        block.layer_scale_1.zero_(), block.layer_scale_2.zero_()
    s = form.generate(stage.blocks[1], x, places)
    assert (s == 0).all()  # without a shortcut; with one the pooled tokens
    assert torch.equal(stage.run_blocks(x), stage.blocks[0](x))
    stage.blocks[1].shortcut = True
    pooled = torch.nn.functional.adaptive_max_pool2d(x[:, :7, :7].permute(0, 3, 1, 2), 3)
    torch.testing.assert_close(form.generate(stage.blocks[1], x, places)[:, :9], pooled.flatten(2).transpose(1, 2))
    constant = form.generate(shaken(stage.blocks[1]), torch.ones_like(x), places)
    if form.sample == 3 and not (isinstance(form, Windowed) and form.mask == "released"):
        torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))


@torch.no_grad()
def test_windows_move_with_the_image():
    form = Windowed(7, 3, (14, 21, 9), None)
    stage, x = stage_of(form, shortcut=True), double_map(49, 49)
    s, moved = (form.generate(stage.blocks[1], y, form.places((49, 49), y)) for y in (x, x.roll((7, 14), (1, 2))))
    s, moved = (y.unflatten(1, (7, 7, 9)) for y in (s, moved))
    torch.testing.assert_close(moved[:, 2:-1, 3:-1], s[:, 1:-2, 1:-3])


# ---- models


@pytest.mark.parametrize("options", [{"img_size": 224}, {"form": "dense", "output_norms": True}, {"patch_norm": True}])
def test_gradients_reach_every_parameter(options):
    torch.manual_seed(0)
    model = STViTR(**TINY, **options).train()
    size = (70, 100) if model.form == "dense" else (224, 224)
    features, maps = model.forward_intermediates(torch.randn(2, 3, *size), norm=True)
    loss = model.forward_head(features).square().sum() + sum(m.square().sum() * m.mean() for m in maps)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name,published", [("stvit_r_small", 5.83), ("stvit_r_base", 10.26)])
def test_multiply_adds(name, published):
    """As published, with what the released code projects again in every window, and a norm behind the stem."""
    model = timm.create_model(name, patch_norm=True).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
    counted = analysis.uncalled_modules_warnings(False).tracer_warnings("none").total()
    dim = 4 * model.embed_dim
    again = 3 * (4 * 109 - 196 - 36) * (2 * dim**2 + 5 * dim)  # three units: keys, values and their norm
    assert round((counted + again) / 1e9, 2) == published


def released_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights as the authors' code would write them: constants of Swin too, and a stem of other names."""
    stem = {"proj.0": "proj.0.c", "proj.1": "proj.0.bn", "proj.3": "proj.2.c", "proj.4": "proj.2.bn"}
    found = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"(?<=patch_embed\.)proj\.\d", lambda m: stem[m.group()], key)
        found[key] = value
        if key.endswith("relative_position_bias_table"):
            found[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    found["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return found


@torch.no_grad()
def test_released_files(tmp_path):
    options = {"embed_dim": 8, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 2, 4)}
    model = timm.create_model("stvit_r_small", **options).eval()
    weights = released_names(model)
    torch.save({"model": weights}, tmp_path / "class.pth")
    loaded = timm.create_model(
        "stvit_r_small", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "class.pth")}, **options
    ).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded(x), model(x))
    # into the dense form, whose norms of outputs start anew
    dense = timm.create_model("stvit_r_small_dense", num_classes=1000, output_norms=False, **options).eval()
    dense.load_state_dict(rename_released(weights, dense))
    # the backbone of a detector, its last norm by the name that it has there
    dense = timm.create_model("stvit_r_small_dense", num_classes=0, **options).eval()
    detector = {f"backbone.{re.sub('^norm[.]', 'norm3.', key)}": v for key, v in released_names(dense).items()}
    other = timm.create_model("stvit_r_small_dense", num_classes=0, **options).eval()
    other.load_state_dict(rename_released({**detector, "rpn_head.weight": torch.zeros(1)}, other))
    for one, two in zip(other.forward_intermediates(x, norm=True)[1], dense.forward_intermediates(x, norm=True)[1]):
        assert torch.equal(one, two)


def test_listed():
    listed = list_models()
    assert all(listed[name].startswith("STViT-R") for name in ("stvit_r_small", "stvit_r_base_dense"))
    assert {"svit_small", "t2t_vit_7", "lvvit_tiny", "vim_tiny_patch16_224", "plain_mamba_l1"} <= set(listed)
    assert all(timm.is_model(name) and text.endswith(".") for name, text in listed.items())


@pytest.mark.parametrize("options", [{}, {"form": "dense", "pad_mask": "exact", "window_size": 5}])
@torch.no_grad()
def test_compiled_and_exported(options):
    torch.manual_seed(0)
    model = STViTR(**{**TINY, "window_size": 4, "img_size": 128, **options}).eval()
    x, more = torch.randn(2, 3, 128, 128), torch.randn(5, 3, 128, 128)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(program(more), model(more), atol=1e-5, rtol=1e-4)


def test_refusals():
    build = partial(STViTR, **{key: value for key, value in TINY.items() if key != "depths"})
    for match, options in (
        ("8 blocks of the third stage", {"depths": (1, 1, 8, 1)}),
        ("form='sparse'", {"form": "sparse"}),
        ("pad_mask='all'", {"form": "dense", "pad_mask": "all"}),
        ("use_global=True", {"form": "dense", "use_global": True}),
        (r"reach=\(3, 21, 27\)", {"form": "dense", "reach": (3, 21, 27)}),
        ("sample_window_size=9", {"sample_window_size": 9}),
        ("three stages or more", {"depths": (1, 1)}),
        (r"two windows of 7 a side .* images of 224 pixels, or form='dense'", {"img_size": 256}),
        ("7 classes need pooled", {"global_pool": ""}),
        ("3 heads do not divide", {"num_heads": (1, 3, 2, 4)}),
    ):
        with pytest.raises(ValueError, match=match):
            build(**{"depths": (1, 1, 6, 1), **options})
    model = STViTR(**TINY)
    with pytest.raises(ValueError, match="two windows of 7 a side"):
        model(torch.randn(1, 3, 96, 96))
    with pytest.raises(ValueError, match="two windows of 7 a side"):
        model.set_input_size(96)
    assert model.patch_embed.img_size == (224, 224)
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(torch.randn(1, 3, 224, 224), output_fmt="NLC")
    with pytest.raises(TypeError, match="semantic tokens of its own.*nearest"):
        tokenzoo.patch_model(model, "tome")
