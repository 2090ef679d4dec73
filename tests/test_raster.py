"""Patches in the order of the grid after every reduction: maps against their matrices, every method, equal answers."""

from __future__ import annotations

import pytest
import timm
import torch
from cases import METHODS, build, given
from hypothesis import settings
from test_map_properties import FORMS, make, sizes

import tokenzoo
from tokenzoo.core.recipe import Recipe
from tokenzoo.maps import MlerpMap, PartialMap, PropagateMap
from tokenzoo.maps.chain import arrange


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("gate", "gated_merge")])  # these move nothing
@settings(max_examples=30, deadline=None)
@sizes
def test_arranged_maps_are_the_same_map_with_permuted_rows(form, n, seed):
    token_map = make(form, n, seed)
    g = torch.Generator().manual_seed(seed + 7)
    rows = torch.stack([torch.randperm(token_map.n_out, generator=g) for _ in range(2)])
    arranged = arrange(token_map, rows)
    matrix = token_map.matrix().double()
    wanted = matrix.gather(1, rows.unsqueeze(-1).expand_as(matrix))
    assert torch.equal(arranged.matrix().double(), wanted)
    x = torch.randn(2, n, 3, generator=g, dtype=torch.float64)
    assert torch.allclose(arranged.apply(x), wanted @ x, atol=1e-12)
    take = rows.unsqueeze(-1)
    assert torch.equal(arranged.pool(x.abs()), token_map.pool(x.abs()).gather(1, take.expand(-1, -1, 3)))
    y = torch.randn(2, token_map.n_out, 3, generator=g, dtype=torch.float64)
    assert torch.equal(arranged.lift(y.gather(1, take.expand(-1, -1, 3))), token_map.lift(y))
    if token_map.valid is not None:
        assert torch.equal(arranged.valid, token_map.valid.gather(1, rows))


@pytest.mark.parametrize("form", ["mlerp", "partial", "propagate"])
@settings(max_examples=30, deadline=None)
@sizes
def test_forms_built_on_others_keep_what_is_their_own(form, n, seed):
    g = torch.Generator().manual_seed(seed)
    merge = make("merge_weighted", n, seed)
    pairs = merge.order, merge.src, merge.slot, n
    token_map = {
        "mlerp": lambda: MlerpMap(*pairs, merge.weight),
        "partial": lambda: PartialMap(*pairs, torch.rand(2, n, 1, generator=g).double(), merge.weight, drops=True),
        "propagate": lambda: PropagateMap(merge.order, n, merge.src, torch.rand(
            2, merge.n_out, merge.src.shape[1], generator=g, dtype=torch.float64
        )),
    }[form]()  # fmt: skip
    rows = torch.stack([torch.randperm(token_map.n_out, generator=g) for _ in range(2)])
    arranged, take = arrange(token_map, rows), rows.unsqueeze(2)
    assert type(arranged) is type(token_map) and arranged.drops == token_map.drops
    x, size = torch.randn(2, n, 3, generator=g, dtype=torch.float64), 1 + torch.rand(2, n, 1, generator=g).double()
    torch.testing.assert_close(arranged.apply(x), token_map.apply(x).gather(1, take.expand(-1, -1, 3)))
    mass = arranged.mass(size, 2, x.device), token_map.mass(size, 2, x.device).gather(1, take)
    torch.testing.assert_close(*mass)


@pytest.mark.parametrize("name", ["deit", "registers", "dinov3"])
@pytest.mark.parametrize("method", METHODS)
def test_patches_stand_in_order(method, name):
    """Places ascend behind every reduction, rests without a place stand last, padding behind these."""
    model = tokenzoo.patch_model(build(name), Recipe.parse(given(method), order="raster"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_tokens(images, trace=True)
        logits = model(images)
    assert logits.isfinite().all()
    sides = [step.side for step in tokens.trace[1:]] + [tokens]
    grids = [step.map.grid_out for step in tokens.trace]
    for side, grid in zip(sides, grids):
        if side.positions is None or grid is not None:
            continue  # untouched, or tokens of another grid
        place = side.positions[:, tokens.layout.num_prefix :]
        place = torch.where(place < 0, 10**6, place)
        if side.valid is not None:
            place = torch.where(side.valid[:, tokens.layout.num_prefix :], place, 10**9)
        assert (place.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("method", ["tome", "evit", "mctf", "topk", "ats", "tofu", "diffrate", "gtp"])
def test_one_reduction_gives_the_same_tokens_in_another_order(method):
    """What follows a single map does not look at the order, so that the answer is the same."""
    rows = {
        "tome": {"r": 3}, "mctf": {"r": 3, "min_tokens": 4}, "ats": {}, "tofu": {"r": 3, "early": 0},
        "diffrate": {"prune": 0.9, "merge": 0.7}, "gtp": {"r": 3, "alpha": 0.4},
    }  # fmt: skip
    options = {**rows.get(method, {"keep_rate": 0.6}), "layers": (1,)}
    images = torch.randn(3, 3, 32, 32)
    answers, places = [], []
    for order in ("method", "raster"):
        model = tokenzoo.patch_model(build("registers").double(), method, order=order, **options)
        with torch.no_grad():
            answers.append(model(images.double()))
            places.append(model.forward_tokens(images.double(), trace=True).trace[-1].map.heads)
    assert torch.allclose(*answers, atol=1e-10)
    if method in ("tome", "evit", "topk"):
        assert not torch.equal(*places)  # the method's own order is another one


def test_option():
    model = tokenzoo.patch_model(build("deit"), "tome", r=2, order="raster")
    recipe = tokenzoo.recipe(model)
    assert recipe == {"method": "tome", "r": 2, "order": "raster"}
    assert tokenzoo.recipe(tokenzoo.patch_model(build("deit"), recipe)) == recipe
    with pytest.raises(ValueError, match="order='grid'; use one of"):
        tokenzoo.patch_model(build("deit"), "tome", r=2, order="grid")
    tokenzoo.unpatch_model(model)
    assert type(model) is timm.models.VisionTransformer


def test_one_graph():
    model = tokenzoo.patch_model(build("deit"), "tome", r=2, order="raster").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        assert torch.allclose(compiled, model(images), atol=1e-5)
