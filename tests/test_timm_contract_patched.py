"""What timm's own tests ask of every model, asked of patched ones: ViT, EVA and every family registered here."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import timm
import torch
from cases import METHODS, given, serves
from scan_cases import SCAN_METHODS
from scan_cases import given as given_scan
from test_timm_contract import PLACED, ROWS, SIZE, image
from test_timm_contract import build as build_own
from timm.models import FeatureInfo, group_parameters
from torch import nn

import tokenzoo
from tokenzoo.models import SViT

TINY = {"img_size": SIZE, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}
NAMES = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "gap": ("vit_base_patch16_siglip_gap_224", {"patch_size": 8}),
    "map": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "beit": ("beit_base_patch16_224", {"patch_size": 8}),
    "relpos": ("vit_relpos_small_patch16_224", {"patch_size": 8}),
}
FAMILIES = (*NAMES, *(family for family in ROWS if family != "stvit"))  # no method acts in windows
SCANNING = ("vim", "vim_none", "plain_mamba")
FEW = ("tome", "mctf", "topk", "uniform", "algm", "tomesd")
ALIKE = ("gap", "distilled", "performer", "transformer", "vim_none")  # another of their blocks gets every method
# they choose counts by values, which the meta device has none of: refused by name
BY_VALUE = {"ats", "algm", "flowcut"}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
# images stacked in rows: of one row in the stage of SViT with 3 x 3 patches; no number divides its last stage as well
STACKED = {"vggt": {"layers": (0, 1), "frames": 3, "stride": (1, 2)}}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(family: str, **options: Any) -> nn.Module:
    """A tiny model in evaluation mode, made as users make it."""
    if family in ROWS:
        return build_own(family, **options)
    torch.manual_seed(0)
    name, more = NAMES[family]
    return timm.create_model(name, **{**TINY, **more, **options}).eval()


def recipe_of(family: str, method: str) -> Any:
    """Reducing options of a method; grids are 6 x 6, those of the models that scan and the last of SViT 3 x 3."""
    if family in SCANNING:
        return given_scan(method, **({"r": 1} if method in ("tome", "famba") else {}))
    own = {"mctf": {"r": 1, "min_tokens": 2}, "reconstruct": {"layers": 1}, **STACKED}
    fewer = own if family == "svit" else {}
    return given(method, **{"ats": {"layers": (1,)}, **fewer}.get(method, {}))


@cache
def learning(family: str) -> frozenset[str]:
    """Parameters that get a gradient where nothing is patched."""
    model = build(family).train()
    model(image()).square().mean().backward()
    return frozenset(name for name, p in model.named_parameters() if p.grad is not None)


def taken(family: str, method: str, model: nn.Module) -> bool:
    """Whether a method serves a model; that it is refused by name otherwise has tests of its own."""
    if isinstance(model, SViT):
        return method not in ("ats", "cts")
    return family in SCANNING or serves(method, model)


PAIRS = [
    (family, method)
    for family, model in ((family, build(family)) for family in FAMILIES)
    for method in (SCAN_METHODS if family in SCANNING else METHODS)
    if (family not in ALIKE or method in FEW) and taken(family, method, model)
]
pairs = pytest.mark.parametrize("family,method", PAIRS)
families = pytest.mark.parametrize("family", FAMILIES)


def patched(family: str, method: str, **options: Any) -> nn.Module:
    return tokenzoo.patch_model(build(family, **options), recipe_of(family, method))


def some(family: str) -> list[str]:
    """A merging and a pruning method."""
    return [m for m in ("tome", "topk", "uniform") if (family, m) in PAIRS][:2]


@pairs
def test_forward_and_backward(family: str, method: str):
    """Every parameter that learns unpatched learns patched; recomputed activations change nothing."""
    model, x = patched(family, method).train(), image()
    out = model(x)
    out.square().mean().backward()
    assert out.shape == (2, 5)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert learning(family) == set(grads)
    assert all(grad.isfinite().all() for grad in grads.values())
    model.eval()
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pairs
@torch.no_grad()
def test_features_and_head(family: str, method: str):
    model, x = patched(family, method), image()
    info = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info))))
    expected, features = model(x), model.forward_features(x)
    out, taps = model.forward_intermediates(x)
    marks = features.isnan()  # in front of sizes that are no whole numbers, and nowhere else
    assert torch.equal(out.isnan(), marks)
    assert not marks.any() or not all(step.map.whole for step in model.forward_tokens(x, trace=True).trace)
    torch.testing.assert_close(out[~marks], features[~marks], **CLOSE)
    assert len(taps) == len(info.channels())
    for tap, channels, ratio in zip(taps, info.channels(), info.reduction()):
        side = math.ceil(SIZE / ratio)
        assert tap.shape == (2, channels, side, side) and tap.isfinite().all()
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, **CLOSE)
    assert features.shape[1 if isinstance(model, SViT) else -1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), expected, **CLOSE)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled, **CLOSE)
    model.reset_classifier(3)
    model.to(torch.bfloat16)  # no table or copy of the other type stays behind
    out = model(x.bfloat16())
    assert out.shape == (2, 3) and out.dtype == torch.bfloat16


@families
def test_what_is_asked_by_name_is_what_it_was(family: str):
    """Configuration, groups of the optimiser and parameters without decay."""
    plain = build(family)
    for method in some(family):
        model = patched(family, method)
        assert model.default_cfg == plain.default_cfg and model.pretrained_cfg == plain.pretrained_cfg
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert model.no_weight_decay() == plain.no_weight_decay()
        for coarse in (False, True):
            groups = [group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (model, plain)]
            assert groups[0] == groups[1]
        names = ("num_classes", "num_features", "head_hidden_size", "in_chans", "feature_info")
        assert all(getattr(model, name) == getattr(plain, name) for name in names if hasattr(plain, name))


@families
@torch.no_grad()
def test_features_only(family: str):
    """timm's wrapper around a patched model gives maps of the whole grid."""
    for method in some(family):
        wrapper = build(family, features_only=True, feature_cls="getter")
        tokenzoo.patch_model(wrapper.model, recipe_of(family, method))
        maps, info = wrapper(image()), wrapper.feature_info
        assert len(maps) == len(info.channels())
        for m, channels, ratio in zip(maps, info.channels(), info.reduction()):
            assert m.shape == (2, channels, math.ceil(SIZE / ratio), math.ceil(SIZE / ratio))


@families
@pytest.mark.parametrize("dense", [False, True])
def test_pruned_models_hand_out_the_same(family: str, dense: bool):
    """Blocks taken off a patched model: taps agree, features of dense maps end at the tap, everything left is used."""
    x = image()
    for method in some(family):
        model = tokenzoo.patch_model(build(family), recipe_of(family, method), dense=dense)
        last = len(model.feature_info) - 1
        with torch.no_grad():
            expected, taps = model(x), model.forward_intermediates(x, intermediates_only=True)
            whole = copy.deepcopy(model)
            whole.prune_intermediate_layers([last], prune_head=False)
            torch.testing.assert_close(whole(x), expected)
        for index in range(last + 1):
            early = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
            torch.testing.assert_close(early[0], taps[index])
            pruned = copy.deepcopy(model)
            left = pruned.prune_intermediate_layers([index], prune_norm=True)
            torch.testing.assert_close(pruned.forward_intermediates(x, left, intermediates_only=True)[0], taps[index])
            features = pruned.forward_features(x)
            if isinstance(model, SViT) and dense and index < last:
                torch.testing.assert_close(features, taps[index])
            maps = pruned.train().forward_intermediates(x, left, intermediates_only=True)
            (maps[0].sum() + pruned.forward_features(x).sum()).backward()
            assert not [name for name, p in pruned.named_parameters() if p.requires_grad and p.grad is None], index


@pytest.mark.skipif(not PLACED, reason="the installed timm places no models on a device")
@pairs
def test_the_meta_device(family: str, method: str):
    """Shapes without numbers, and classifiers made anew where the model lies; counts by value are refused by name."""
    model = patched(family, method, device="meta", dtype=torch.float64)
    x = torch.empty(2, 3, SIZE, SIZE, device="meta", dtype=torch.float64)
    if method in BY_VALUE:
        with pytest.raises(ValueError, match=f"{method} at block.*meta device.*fixed budget"):
            model(x)
        return
    out = model(x)
    assert out.is_meta and out.dtype == torch.float64 and out.shape == (2, 5)
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    assert model.requires_grad_(False).set_input_size(img_size=(2 * SIZE, 2 * SIZE)) is None
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


@families
def test_graphs_that_cannot_be_are_refused(family: str):
    """torch.jit.script and torch.fx, in one sentence each."""
    model = patched(family, some(family)[0])
    with pytest.raises(TypeError, match="torch.jit.script cannot compile .*tokenzoo has patched.*unpatch_model first"):
        torch.jit.script(model)
    with pytest.raises(TypeError, match="torch.fx cannot trace .*tokenzoo has patched.*forward_intermediates"):
        torch.fx.symbolic_trace(model)
