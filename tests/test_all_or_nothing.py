"""Patching, updating and unpatching happen as a whole or not at all, whatever raises in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import scan_cases
import torch
from cases import METHODS, VIT, build, given, images
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

import tokenzoo
from tokenzoo.core import registry
from tokenzoo.core.method import Method, Step
from tokenzoo.core.mixins import Companion
from tokenzoo.core.recipe import Recipe
from tokenzoo.core.traits import BETWEEN, Traits
from tokenzoo.models import SViT


class Broken(Exception):
    """What a test raises."""


def _svit() -> nn.Module:
    torch.manual_seed(0)
    return SViT(embed_dim=(8, 8, 16), depths=(1, 2, 2), num_heads=(1, 2, 2), stoken_size=(2, 1, 1), projection=16,
                layerscale=(False,) * 3, num_classes=3, img_size=64).eval()  # fmt: skip


def _sam() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformerSAM(
        img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, window_size=4,
        global_attn_indexes=(2,), neck_chans=16,
    ).eval()  # fmt: skip


# model, recipe, change of options
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], dict[str, Any]]] = {
    "vit": (lambda: build("deit"), "evit", {"keep_rate": 0.6, "layers": (1, 2)}, {"keep_rate": 0.5}),
    "eva": (lambda: build("eva02"), "tome", {"r": 2}, {"r": 1}),
    "parallel": (lambda: build("parallel_things"), "topk", {"layers": (1,)}, {"keep_rate": 0.4}),
    "t2t_vit": (lambda: build("t2t_vit"), "tomesd", {}, {"ratio": 0.3}),
    "vim": (lambda: scan_cases.build("vim"), "famba", {"r": 2}, {"r": 1}),
    "plain_mamba": (lambda: scan_cases.build("plain_mamba"), "uniform", {"layers": (1,)}, {"keep_rate": 0.5}),
    "svit": (_svit, "evit", {"layers": (1, 3)}, {"keep_rate": 0.5}),
    "sam": (_sam, "cluster", {"layers": 0}, {"scale": 0.5}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def state(model: nn.Module) -> list[Any]:
    """Class, attributes and children of every module; attributes by identity."""
    held = []
    for name, module in model.named_modules():
        plain = {k: id(v) for k, v in vars(module).items()}
        held.append((name, type(module), plain, list(module._modules), list(module._parameters)))
    return [*held, list(model.state_dict())]


def picture(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(3)))


def at_every_write(model: nn.Module, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets the first, second, ... write to a module raise until none is left; the model must not have changed.

    Returns:
        The number of writes.
    """
    before, expected, writes = state(model), picture(model), 0
    kinds = ("__setattr__", "__delattr__", "add_module")
    while True:
        countdown, writes = writes, writes + 1
        with monkeypatch.context() as patch:
            for kind in kinds:
                own = getattr(nn.Module, kind)

                def write(self, *args, own=own):
                    nonlocal countdown
                    countdown -= 1
                    if countdown == -1:
                        raise Broken
                    return own(self, *args)

                patch.setattr(nn.Module, kind, write)
            try:
                act()
                return writes - 1
            except Broken:
                pass
        assert state(model) == before
        assert torch.equal(picture(model), expected)


@each_family
def test_a_write_that_fails_leaves_the_model_as_it_was(family, monkeypatch):
    make, method, options, change = FAMILIES[family]
    model = make()
    plain, start = state(model), picture(model)
    assert at_every_write(model, lambda: tokenzoo.patch_model(model, method, **options), monkeypatch) >= 3
    patched = picture(model)
    assert at_every_write(model, lambda: tokenzoo.update_method(model, **change), monkeypatch) >= 3
    updated = picture(tokenzoo.patch_model(make(), method, **{**options, **change}))
    assert torch.equal(picture(model), updated) and not torch.equal(updated, patched)
    assert at_every_write(model, lambda: tokenzoo.unpatch_model(model), monkeypatch) >= 3
    assert state(model) == plain and torch.equal(picture(model), start)


STAGES = ("check", "check_recipe", "strengths", "tokens_out", "count", "module", "place", "pads")


@dataclass(frozen=True, kw_only=True)
class Faulty(Companion, Method):
    """Keeps the first patches, with a learned module where asked for; raises at one stage from one block on."""

    keep: int
    stage: str = ""
    block: int = 0
    learned: bool = True

    name = "faulty"
    source = "this test"
    kind = "prune"
    traits = Traits(place=lambda m: m._at("place") or BETWEEN, pads=lambda m: m._at("pads") or False)

    def _at(self, stage: str, block: int = 99) -> None:
        if self.stage == stage and block >= self.block:
            raise Broken(stage)

    def check(self, layout, model):
        self._at("check")

    def check_recipe(self, methods, depth):
        self._at("check_recipe")

    def strengths(self, depth):
        self._at("strengths")
        return {i: self.keep for i in self.resolve_layers(depth)}

    def tokens_out(self, n, step, layout):
        self._at("tokens_out", step.block)
        return min(n, layout.num_prefix + step.strength)

    def count(self, n, step, layout):
        self._at("count", step.block)

    def module(self, dim, step):
        self._at("module", step.block)
        return nn.Linear(dim, 1) if self.learned else None

    def map(self, tokens, signals, step: Step):
        from tokenzoo.core.selection import keep_best

        return keep_best(-tokens.x.norm(dim=2), tokens, lambda n: min(n, step.strength))


@pytest.fixture(autouse=True)
def faulty() -> Iterator[None]:
    """A method with an option that has to be given, registered for the length of a test."""
    registry.register(Faulty)
    yield
    del registry._METHODS["faulty"]


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backbone", ["deit", "vim"])
def test_a_method_that_raises_leaves_the_model_as_it_was(backbone, stage, block, monkeypatch):
    monkeypatch.setattr(Faulty, "serves_scans", True)
    models = scan_cases if backbone == "vim" else None
    model = models.build("vim") if models else build("deit")
    before, expected = state(model), picture(model)
    with pytest.raises(Broken):
        tokenzoo.patch_model(model, "faulty", keep=5, stage=stage, block=block)
    assert state(model) == before and torch.equal(picture(model), expected) and not tokenzoo.is_patched(model)
    tokenzoo.patch_model(model, "faulty", keep=5, learned=False)
    before, expected = state(model), picture(model)
    with pytest.raises(Broken):
        tokenzoo.update_method(model, keep=4, stage=stage, block=block)
    assert state(model) == before and torch.equal(picture(model), expected)
    tokenzoo.update_method(model, keep=4)  # an option that has to be given stays as it was given
    assert tokenzoo.recipe(model)["keep"] == 4 and tokenzoo.report(model).tokens_out < 8


def test_learned_modules_leave_with_a_patch_that_fails(monkeypatch):
    model = build("deit")
    start = state(model)
    writes = at_every_write(model, lambda: tokenzoo.patch_model(model, "faulty", keep=5), monkeypatch)
    assert writes > 10 and any("tokenzoo_0_faulty" in key for key in model.state_dict())
    at_every_write(model, lambda: tokenzoo.unpatch_model(model), monkeypatch)
    assert state(model) == start


def test_an_update_that_would_bring_modules_in_is_refused():
    model = build("deit")
    tokenzoo.patch_model(model, "faulty", keep=5, learned=False)
    before = state(model)
    with pytest.raises(ValueError, match="learned modules"):
        tokenzoo.update_method(model, learned=True)
    assert state(model) == before
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, "cts", shared=2)
    with pytest.raises(ValueError, match="learned modules"):
        tokenzoo.update_method(model, score="policy")


def test_an_update_is_checked_as_a_patch_is():
    model = build("parallel_scaling")
    tokenzoo.patch_model(model, "tomesd")
    before = state(model)
    with pytest.raises(ValueError, match="beside attention"):
        tokenzoo.update_method(model, branches=("mlp",))
    assert state(model) == before


def test_refusals_build_no_method():
    """One with an option that has to be given stands beside them."""
    with pytest.raises(ValueError, match="its tokens are scanned; use one of famba, mtr, pool, random"):
        tokenzoo.patch_model(scan_cases.build("vim"), "evit")
    with pytest.raises(ValueError, match=r"\(cluster, reconstruct\); tome at"):
        tokenzoo.patch_model(_sam(), "tome", r=1)


# ---- models that lose blocks after patching

RECIPES = {method: given(method) for method in METHODS}
RECIPES |= {f"{method} by default": method for method in ("evit", "topk", "tomesd", "sta", "pool", "ats")}
RECIPES["reconstruct behind the norm"] = [{"method": "cluster", "layers": 0}, "reconstruct"]
RECIPES["rates by layer"] = {"method": "evit", "keep_rate": (0.9, 0.7), "layers": (0, 3)}


def acts_differently(recipe):
    """Whether the same options mean something else in a model of three blocks than in the first three of four."""
    try:
        shorter = Recipe.parse(recipe).steps(3)
    except ValueError:
        return True
    first = {block: steps for block, steps in Recipe.parse(recipe).steps(4).items() if block < 3}
    return [[s.strength for s in steps] for steps in first.values()] != [
        [s.strength for s in steps] for steps in shorter.values()
    ]


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_report_describes_what_runs(name):
    model, cut = build("deit"), build("deit")
    tokenzoo.patch_model(model, RECIPES[name])
    x = images(model)
    whole = model.forward_intermediates(x, [0, 1, 2], intermediates_only=True)
    for m in (model, cut):
        m.prune_intermediate_layers([0, 1, 2])
    assert all(map(torch.equal, whole, model.forward_intermediates(x, [0, 1, 2], intermediates_only=True)))
    report, walked = tokenzoo.report(model), [tokens.length for tokens in model.walk(x)][1:]
    if "norm" in name:  # listed with the last block
        walked[-1] = 17
    assert report.data_dependent or [row.tokens_out for row in report.rows[1:-1]] == walked
    assert report.data_dependent or report.tokens_out == model.forward_tokens(x).length
    acting = {method for row in report.rows for method in row.methods.split(", ") if method}
    assert acting == {s.method.name for block in model.blocks for s in block.tokenzoo.steps} | (
        {"reconstruct"} if "norm" in name else set()
    )
    try:
        recipe = tokenzoo.recipe(model)
    except ValueError as error:
        assert "prune_intermediate_layers" in str(error), error
        assert acts_differently(RECIPES[name]), name  # no options for three blocks say the same
        return
    tokenzoo.patch_model(cut, recipe)
    cut.load_state_dict(model.state_dict())  # learned modules are new, and random
    assert torch.equal(cut.forward_features(x), model.forward_features(x))
    assert tokenzoo.report(cut) == report
    tokenzoo.unpatch_model(model)
    tokenzoo.unpatch_model(cut)
    assert torch.equal(cut(x), model(x))


@torch.no_grad()
def test_an_update_after_pruning_is_that_of_the_whole_model():
    model, other = VIT(depth=8).eval(), VIT(depth=8).eval()
    other.load_state_dict(model.state_dict())
    x = images(model)
    tokenzoo.patch_model(model, "topk", keep_rate=0.9)  # at 2, 4 and 6
    model.prune_intermediate_layers([4])
    tokenzoo.update_method(model, keep_rate=0.5)
    tokenzoo.patch_model(other, "topk", keep_rate=0.5)
    (expected,) = other.forward_intermediates(x, [4], intermediates_only=True)
    assert torch.equal(model.forward_intermediates(x, [4], intermediates_only=True)[0], expected)


@torch.no_grad()
def test_a_step_behind_the_norm_stays_and_is_not_left_out_in_silence():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, RECIPES["reconstruct behind the norm"])
    z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for blocks in (model.blocks, model.blocks[1:]):
        with pytest.raises(ValueError, match="reconstruct at block 3.*called without their model; call the model"):
            model.norm(blocks(z))
    assert model.forward_features(x).shape[1] == 17
    model.prune_intermediate_layers([2])
    assert model.forward_features(x).shape[1] == 17
    with pytest.raises(ValueError, match="called without their model"):
        model.norm(model.blocks(z))


def test_every_test_starts_from_one_seed():
    assert torch.initial_seed() == 0
