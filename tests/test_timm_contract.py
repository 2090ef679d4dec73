"""What timm's own tests ask of every model, asked of every family that is registered here (tiny versions)."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokenzoo.models
from tokenzoo.models import lookupvit, lv_vit, t2t_vit
from tokenzoo.models.plain_mamba import model as plain_mamba
from tokenzoo.models.stvit import sizes as stvit
from tokenzoo.models.svit import model as svit
from tokenzoo.models.vim import sizes as vim_sizes

SIZE = 48  # pixels
CLASSES = 5


class Row(NamedTuple):
    """A family: a registered name, options that make it tiny, and what its features are.

    Attributes:
        name: registered model.
        options: options of `timm.create_model`.
        maps: features are maps [B, C, h, w], else tokens [B, N, C].
        scripts: TorchScript compiles it.
    """

    name: str
    options: dict[str, Any]
    maps: bool = False
    scripts: bool = True


ROWS = {
    "svit": Row(
        "svit_small",
        {
            "embed_dim": (8, 12, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4),
            "stoken_size": (4, 2, 1, 1), "layerscale": (False, False, True, True), "projection": 24,
        },
        maps=True,
    ),
    "stvit": Row(
        "stvit_r_small",
        {
            "embed_dim": 8, "depths": (1, 2, 6, 1), "num_heads": (1, 2, 2, 4), "form": "dense", "window_size": 4,
            "sample_window_size": 2, "reach": (6, 8, 6),
        },
        maps=True,
        scripts=False,
    ),
    "performer": Row("t2t_vit_7", {"embed_dim": 32, "depth": 3, "num_heads": 2, "token_dim": 8}),
    "transformer": Row("t2t_vit_t_14", {"embed_dim": 32, "depth": 3, "num_heads": 2, "token_dim": 8}),
    "lvvit": Row("lvvit_small", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "vim": Row("vim_tiny", {"embed_dim": 16, "depth": 3, "d_state": 4}, scripts=False),
    "vim_none": Row("vim_tiny", {"embed_dim": 16, "depth": 3, "d_state": 4, "cls_position": "none"}, scripts=False),
    "plain_mamba": Row("plain_mamba_l1", {"embed_dim": 16, "depth": 3, "d_state": 4, "conv_size": 3}, scripts=False),
}  # fmt: skip
# TorchScript is deprecated, but part of what timm promises
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
families = pytest.mark.parametrize("family", ROWS)
# old releases of timm have no device and dtype in the models that T2T-ViT and LV-ViT are built on
PLACED = "device" in inspect.signature(VisionTransformer).parameters
ON_VIT = ("performer", "transformer", "lvvit")
placed = pytest.mark.parametrize("family", [family for family in ROWS if PLACED or family not in ON_VIT])
modules = (lookupvit, stvit, svit, t2t_vit, lv_vit, vim_sizes, plain_mamba)


def build(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny model in evaluation mode, made as users make it."""
    torch.manual_seed(seed)
    row = ROWS[family]
    given = {"img_size": SIZE, "num_classes": CLASSES, **row.options, **options}
    return timm.create_model(row.name, **given).eval()


def image(batch: int = 2, size: tuple[int, int] = (SIZE, SIZE), seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_every_family_has_a_row():
    # LookupViT draws its grid in Python, which tracers cannot follow (test_lookupvit.py has what it keeps to);
    # CATANetSR enlarges images and is no classifier
    covered = {type(build(family)) for family in ROWS} | {tokenzoo.models.LookupViT, tokenzoo.models.CATANetSR}
    assert covered == {getattr(tokenzoo.models, name) for name in tokenzoo.models.__all__ if name[0].isupper()}


# ---- creation


@placed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_device_and_dtype(family: str, dtype: torch.dtype):
    """On "meta", without a context of torch: every tensor lies there, floats in the type that was asked for."""
    model = build(family, device="meta", dtype=dtype)
    for name, value in model.state_dict().items():
        assert value.is_meta, name
        assert not value.is_floating_point() or value.dtype == dtype, name
    assert all(b.is_meta for b in model.buffers())
    out = model(torch.empty(2, 3, SIZE, SIZE, device="meta", dtype=dtype))
    assert out.shape == (2, CLASSES) and out.dtype == dtype


@placed
def test_real_weights_do_not_depend_on_how_the_device_is_said(family: str):
    plain, said = build(family), build(family, device="cpu", dtype=torch.float32)
    assert plain.state_dict().keys() == said.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, said.state_dict()[name]), name
    assert torch.equal(plain(image()), said(image()))


@families
def test_unknown_options_are_refused(family: str):
    with pytest.raises(TypeError):
        build(family, not_an_option=1)


@pytest.mark.parametrize("name", sorted(name for module in modules for name in module.default_cfgs))
def test_configuration(name: str):
    """What timm's loader, transforms and optimiser factory look up by name is there, for every registered size."""
    with torch.device("meta" if PLACED else "cpu"):
        model = timm.create_model(name)
    weights, cfg = model.state_dict(), model.default_cfg
    assert model.in_chans == cfg["input_size"][0]
    for entry in ("first_conv", "classifier"):
        named = (cfg[entry],) if isinstance(cfg[entry], str) else cfg[entry]
        for layer in named:
            assert f"{layer}.weight" in weights, (entry, layer)
    assert model.get_classifier().weight.shape[0] == cfg["num_classes"]
    assert cfg["pool_size"] is None or isinstance(model, tokenzoo.models.SViT | tokenzoo.models.STViTR)


def test_weights_for_other_channels():
    """A T2T-ViT has no convolution that timm could adapt to other channels."""
    weights = build("performer").state_dict()
    filtered = t2t_vit._fit(dict(weights), build("performer"))
    assert filtered.keys() == weights.keys()
    with pytest.raises(ValueError, match="weights are for images of 3 channels, the model for 1"):
        t2t_vit._fit(dict(weights), build("performer", in_chans=1))


# ---- forward, backward, parameters


@families
def test_every_parameter_has_a_gradient(family: str):
    model = build(family).train()
    out = model(image())
    assert out.shape == (2, CLASSES)
    out.mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@families
def test_checkpointing_changes_no_output(family: str):
    model = build(family)
    expected = model(image())
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(image()), expected)


@families
def test_groups_and_decay(family: str):
    model = build(family)
    names = dict(model.named_parameters())
    for name in model.no_weight_decay():  # an optional token may be listed where this model has none
        assert name in names or getattr(model, name, None) is None, name
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == set(names) and len(set(groups.values())) > 1


@families
def test_type_can_change_after_a_forward(family: str):
    model = build(family)
    model(image())
    model.to(torch.bfloat16)
    assert model(image().bfloat16()).dtype == torch.bfloat16


# ---- features and head


@families
def test_head(family: str):
    model, row = build(family), ROWS[family]
    features = model.forward_features(image())
    assert features.shape[1 if row.maps else -1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(image()))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    expected, without = model(image()), copy.deepcopy(model)
    without.reset_classifier(0)
    assert without.num_classes == 0 and torch.equal(without(image()), pooled)
    if family not in ("lvvit",):  # whose second classifier is made anew, too
        torch.testing.assert_close(model.get_classifier()(pooled), expected)
    fresh = build(family, num_classes=0)
    assert fresh(image()).shape == pooled.shape
    unpooled = build(family, num_classes=0, global_pool="")
    assert unpooled(image()).shape == features.shape
    without.reset_classifier(0, "")
    assert without(image()).shape == features.shape


@placed
@pytest.mark.parametrize("train", [False, True])
def test_new_classifiers_are_like_the_model(family: str, train: bool):
    for pool in (None, ""):  # a model without pooling, too
        model = build(family, **({} if pool is None else {"num_classes": 0, "global_pool": pool}))
        model.train(train).to(device="meta", dtype=torch.float64)
        model.reset_classifier(0)
        model.reset_classifier(2)
        for p in model.get_classifier().parameters():
            assert p.is_meta and p.dtype == torch.float64
        assert all(module.training == train for module in model.modules())


@families
def test_frozen_models_stay_frozen(family: str):
    model = build(family)
    model.requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=(2 * SIZE, 2 * SIZE))
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    assert model(image(1, (2 * SIZE, 2 * SIZE))).shape == (1, model.num_features)


@families
def test_sizes_that_are_not_square(family: str):
    model = build(family)
    model.set_input_size((64, 32))
    other = image(2, (64, 32))
    taps = model.forward_intermediates(other, intermediates_only=True)
    assert taps[0].shape[2:] == tuple(model.patch_embed.dynamic_feat_size((64, 32)))
    assert model(other).shape == (2, CLASSES)
    assert build(family, img_size=(64, 32))(other).shape == (2, CLASSES)


# ---- intermediate features


@families
def test_intermediates(family: str):
    model = build(family)
    info = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info))))
    out, taps = model.forward_intermediates(image())
    assert len(taps) == len(info.channels()) >= 3
    for tap, channels, ratio in zip(taps, info.channels(), info.reduction()):
        side = math.ceil(SIZE / ratio)
        assert tap.shape == (2, channels, side, side) and tap.isfinite().all()
    torch.testing.assert_close(out, model.forward_features(image()), rtol=1e-5, atol=1e-8)


@families
@pytest.mark.parametrize("kind", [None, "getter"])
def test_features_only(family: str, kind: str | None):
    options = {} if kind is None else {"feature_cls": kind}
    model = build(family, features_only=True, **options)
    maps = model(image())
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for m, ratio in zip(maps, model.feature_info.reduction()):
        assert m.shape[2] == m.shape[3] == math.ceil(SIZE / ratio)


@families
def test_pruned_models_hand_out_the_same(family: str):
    """What is left after pruning at any block: the taps agree, features end at the tap, everything left is used."""
    model, row, x = build(family), ROWS[family], image()
    last = len(model.feature_info) - 1
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([last], prune_head=False)
        torch.testing.assert_close(whole(x), model(x))
    for index in range(last + 1):
        early = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], taps[index])
        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            left = pruned.prune_intermediate_layers([index], prune_norm=prune_norm)
            torch.testing.assert_close(pruned.forward_intermediates(x, left, intermediates_only=True)[0], taps[index])
            features = pruned.forward_features(x)
            if row.maps and index < last:
                torch.testing.assert_close(features, taps[index])
            assert pruned.num_features == features.shape[1 if row.maps else -1]
        pruned.train()
        maps = pruned.forward_intermediates(x, left, intermediates_only=True)
        (maps[0].sum() + pruned.forward_features(x).sum()).backward()
        assert not [name for name, p in pruned.named_parameters() if p.grad is None], index


# ---- graphs


def traced_by_fx(model: nn.Module) -> nn.Module:
    """torch.fx as timm's feature extractors use it: marked modules and functions stay whole."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, tuple(get_notrace_modules())) or super().is_leaf_module(module, name)

    tracer = Tracer(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
    return torch.fx.GraphModule(model, tracer.trace(model))


@families
def test_fx(family: str):
    model = build(family)
    graph, expected = traced_by_fx(model), model(image())
    torch.testing.assert_close(graph(image()), expected)
    graph(image()).sum().backward()
    assert not [name for name, p in graph.named_parameters() if p.grad is None]


@families
def test_torchscript(family: str, tmp_path):
    """Compiled where the scan's operator is not in the way; the others say so in one sentence."""
    with set_scriptable(True):
        model = build(family)
    if not ROWS[family].scripts:
        with pytest.raises(ValueError, match="cannot be compiled by torch.jit.script.*use torch.jit.trace"):
            torch.jit.script(model)
        return
    expected = model(image())
    for compiled in (torch.jit.script(copy.deepcopy(model)), torch.jit.script(traced_by_fx(model))):
        compiled.save(str(tmp_path / "model.pt"))
        for each in (compiled, torch.jit.load(str(tmp_path / "model.pt"))):
            torch.testing.assert_close(each(image()), expected)
            torch.testing.assert_close(each(image(3, seed=2)), model(image(3, seed=2)))
    assert torch.equal(model(image()), expected)  # and the model is what it was


@families
def test_traces_keep_the_batch_open(family: str):
    model = build(family)
    with torch.no_grad():
        trace = torch.jit.trace(model, image())
        for batch in (2, 1, 5):
            other = image(batch, seed=batch)
            torch.testing.assert_close(trace(other), model(other))
