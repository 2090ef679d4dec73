"""What `attn_mask` hides: such patches are in no visible token, decide nothing about one, and go first."""

from __future__ import annotations

import pytest
import torch
from cases import EVERY, METHODS, VIT, ZOO, backbone_names, build, given, images, serves
from torch import Tensor

import tokenzoo
from tokenzoo.adapters.inspect import describe
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import MergeMap

FOLLOW = [name for name in METHODS if tokenzoo.method_class(name).kind != "attention"]
MIX = [name for name in FOLLOW if tokenzoo.create_method(name).mixes]
PRUNE = {
    "topk": {"keep_rate": 0.6},
    "random": {"keep_rate": 0.6},
    "uniform": {"keep_rate": 0.6},
    "evit": {"keep_rate": 0.6, "fuse_token": False},
}
# block types, prefix layouts and rotary tables; class attention and attention received
MODELS = [
    name
    for name in (
        "deit", "parallel_scaling", "parallel_things", "differential", "gap", "registers", "eva02", "eva_post_norm",
        "dinov3", "rope_mixed", "beit", "cait",
    )
    if name in backbone_names()
]  # fmt: skip
# options of methods that take another way through their code than the row of the matrix
MORE = [
    {"method": "tome", "r": [8, 2, 1]},
    {"method": "tome", "r": 2, "mass_pool": True},
    {"method": "mctf", "r": 4, "min_tokens": 2, "pooling": "max"},
    {"method": "mctf", "r": 4, "min_tokens": 2, "one_step_ahead": 0, "tau_info": 1},
    {"method": "mctf", "r": [0, 8, 4], "min_tokens": 2, "one_step_ahead": 2, "bidirectional": False},
    {"method": "algm", "r": (2, 3)},
    {"method": "algm", "threshold": 0.1, "batch_min": True},
    {"method": "cluster", "layers": 1, "grid": (3, 3), "iterations": 0},
    {"method": "cluster", "layers": 1, "grid": (3, 2), "iterations": 3, "temperature": 1.0, "prop_attn": True},
    {"method": "pool", "stride": 3, "prop_attn": True},
    {"method": "cts", "shared": 4},
    {"method": "cts", "shared": 2, "score": "policy"},
    {"method": "tomesd", "stride": None, "ratio": 0.4, "metric": "normed", "branches": ("mlp", "attention")},
    {"method": "tomesd", "seed": 3, "ratio": 0.7},
    {"method": "evo", "keep_rate": 0.2, "layers": (1, 2, 3)},
    {"method": "ats", "layers": (1, 2), "max_tokens": 6},
    {"method": "topk", "mass": 0.7, "layers": (1, 2)},
    {"method": "evit", "mass": 0.7, "tokens": 6, "layers": (1, 2)},
    {"method": "pitome", "keep_rate": 0.5, "ordered": "none", "metric": "tokens"},
    {"method": "pitome", "keep_rate": (0.9, 0.5, 0.6, 0.5), "ordered": "all", "prop_attn": True},
    {"method": "pitome", "keep_rate": 0.6, "ordered": "none", "energy": "gaussian", "mass_pool": True},
    {"method": "tofu", "r": [8, 2, 1], "early": 0},
    {"method": "tofu", "r": 3, "early": 1, "rule": "ports"},
    {"method": "ppt", "r": [6, 3, 2], "layers": (0, 1, 2), "threshold": 2e-2, "prop_attn": False},
    {"method": "ppt", "r": 4, "layers": (1, 3), "threshold": 0},
    {"method": "ppt", "r": 4, "layers": (1, 3), "threshold": 1.0},
    {"method": "kmedoids", "keep_rate": 0.6, "start": "farthest", "cost": "cluster", "mean": True},
    {"method": "gtp", "r": 4, "layers": (0, 2), "graph": "semantic", "neighbours": 5, "selection": "IMGAttnMean"},
    {"method": "gtp", "r": 3, "sparsity": 0.6},
    {"method": "atc", "keep_rate": 0.4, "linkage": "single"},
    {"method": "atc", "keep_rate": 0.3, "linkage": "complete", "layers": (1, 2)},
    {"method": "gtp", "r": 3, "propagation": "mean", "selection": "DiagAttnMean"},
    {"method": "turbo", "r": [8, 2, 1], "min_tokens": 0, "alpha": 5, "beta": 0.5, "gamma": 1},
    {"method": "diffrate", "prune": None, "merge": (0.5, 0.9, 0.6, 0.7), "mass_pool": True},
    {"method": "diffrate", "prune": 0.8, "merge": None, "prop_attn": False},
]  # fmt: skip
PAIRS = [
    ["ats", "tome"], ["ats", "evit"], ["ats", "uniform"], ["ats", "mctf"], ["ats", "pool"], ["ats", "tomesd"],
    ["evit", "mctf"], ["uniform", "algm"], ["pool", "tome"], ["cts", "tomesd"], ["tome", "evo"], ["cluster", "topk"],
    ["tomesd", "algm"], ["algm", "topk"],
]  # fmt: skip


def hidden_patches(patches: int = 16, seed: int = 0) -> Tensor:
    """[5, patches] bool: the lower half, every second patch, all but one, some at random, none."""
    drawn = torch.rand(patches, generator=torch.Generator().manual_seed(seed)) < 0.5
    index = torch.arange(patches)
    return torch.stack([index >= patches // 2, index % 2 == seed % 2, index != 5, drawn, index < 0])


def mask_of(hidden: Tensor, prefix: int, form: str) -> Tensor:
    """A mask of the keys that are hidden [B, M]: shape and kind of entries by name."""
    shape, kind = form.split(" ")
    keys = torch.cat([hidden.new_zeros(len(hidden), prefix), hidden], dim=1)[:, None, None, :]
    n = keys.shape[-1]
    if shape == "NN":
        keys = keys[0, 0].expand(n, n)
    elif shape == "BNN":
        keys = keys[:, 0].expand(-1, n, -1)
    elif shape == "diagonal":  # a hidden token still sees itself
        keys = keys.expand(-1, -1, n, -1) & ~torch.eye(n, dtype=torch.bool)
    elif shape == "outer":  # and sees nothing but itself
        keys = (keys | keys.transpose(2, 3)) & ~torch.eye(n, dtype=torch.bool)
    if kind == "bool":
        return ~keys
    return torch.zeros(keys.shape).masked_fill(keys, {"inf": float("-inf"), "min": torch.finfo().min}[kind])


FORMS = ["B11N bool", "B11N inf", "B11N min", "BNN bool", "BNN inf", "diagonal bool", "diagonal inf", "outer bool"]


def painted(x: Tensor, hidden: Tensor, seed: int = 7) -> Tensor:
    """The images with other pixels, three times as loud, where patches are hidden."""
    grid = round(hidden.shape[1] ** 0.5)
    side = x.shape[-1] // grid
    where = hidden.view(-1, 1, grid, grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(where, 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), x)


def form_of(*names: str) -> str:
    """One of the forms, another for other names."""
    return FORMS[sum(map(ord, "".join(names))) % len(FORMS)]


@torch.no_grad()
def check_no_leak(model, recipe, form: str, seed: int) -> None:
    """Visible tokens, lifted visible patches and outputs from the class token do not feel hidden pixels."""
    prefix, hidden = describe(model).layout.num_prefix, hidden_patches(seed=seed)
    if not prefix:
        form = form.replace("outer", "diagonal")  # where one token sees but itself, no other token sees anything
    # in float64: choices between scores that are nearly alike must not hang on the rounding of one processor
    mask, x = mask_of(hidden, prefix, form), images(model.double(), batch=len(hidden)).double()
    mask = mask if mask.dtype == torch.bool else mask.double()
    tokenzoo.patch_model(model, recipe)
    try:
        a, b = (model.forward_tokens(y, mask, dense=True) for y in (x, painted(x, hidden)))
        assert torch.equal(a.visible, b.visible) and a.x.shape == b.x.shape and a.x.isfinite().all()
        seen, prefix = a.visible, a.layout.num_prefix  # a class token may have come in behind the blocks
        assert seen[:, :prefix].all()
        torch.testing.assert_close(a.x[seen], b.x[seen], atol=2e-5, rtol=1e-4)
        assert (a.size is None) == (b.size is None)
        if a.size is not None:
            torch.testing.assert_close(a.size[seen], b.size[seen])
        places = torch.cat([hidden.new_ones(len(hidden), prefix), ~hidden], dim=1)
        torch.testing.assert_close(*(model.lift_features(t)[places] for t in (a, b)), atol=2e-5, rtol=1e-4)
        for step in a.trace:
            if not step.map.linear:
                continue
            try:
                matrix, before = step.map.matrix(), step.side.visible
            except TypeError:  # values that follow from no old ones
                continue
            after = (step.map.pool(before.unsqueeze(-1).float()) > 0).squeeze(-1)
            mixed = matrix * after.unsqueeze(2) * ~before.unsqueeze(1)
            assert (mixed == 0).all(), f"{step.method} mixes hidden tokens into visible ones"
        # every image as it would be alone
        shared = "batch_min" in str(recipe)
        for image in () if shared else (0, 3):  # counts are a matter of the batch there
            own = slice(image, image + 1)
            alone = model.forward_tokens(x[own], mask[own])
            count = int(alone.visible.sum())
            assert count == int(seen[image].sum())
            torch.testing.assert_close(alone.x[alone.visible], a.x[image][seen[image]], atol=2e-5, rtol=1e-4)
    finally:
        tokenzoo.unpatch_model(model).float()


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in MODELS}


@pytest.mark.parametrize("method", FOLLOW)
@pytest.mark.parametrize("backbone", MODELS)
def test_hidden_pixels_reach_no_visible_token(models, backbone, method):
    model = models[backbone]
    if not serves(method, model):
        pytest.skip("needs a class token")
    check_no_leak(model, given(method), form_of(backbone, method), seed=len(method) + len(backbone))


@pytest.mark.parametrize("number", range(len(MORE)))
@pytest.mark.parametrize("backbone", ["deit", "gap", "eva02"])
def test_hidden_pixels_and_options(models, backbone, number):
    if not serves(MORE[number]["method"], models[backbone]):
        pytest.skip("needs a class token")
    for seed in (0, 1):
        check_no_leak(models[backbone], MORE[number], form_of(backbone, str(number)), seed)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("backbone", ["deit", "eva02"])
def test_hidden_pixels_and_two_methods(models, backbone, names):
    first, second = (given(name) for name in names)
    if names[1] in ("topk", "tome", "algm", "evo", "evit", "uniform", "mctf"):
        layers = {"evo": (3,), "algm": (2, 3)}.get(names[1], (3,))
        second = {**second, "layers": layers, **({"clip": True} if names[1] in ("tome", "mctf") else {})}
    if names == ["tome", "evo"]:  # patches that follow evo's representative share its key: ties, which rounding breaks
        first = {**first, "layers": (0, 1, 2)}
    check_no_leak(models[backbone], [first, second], form_of(backbone, *names), seed=1)


@torch.no_grad()
def test_hidden_pixels_and_reconstruction(models):
    """Rebuilt inside the model, visible patches read centres of visible ones."""
    model, hidden = models["deit"], hidden_patches()
    x, mask = images(model, batch=5), mask_of(hidden, 1, "B11N bool")
    for norm in ("l1", "l2", "copy"):
        recipe = [
            {"method": "cluster", "layers": 0, "scale": 0.6, "temperature": 0.5},
            {"method": "reconstruct", "layers": 2, "norm": norm},
        ]
        with tokenzoo.patched(model, recipe):
            a, b = (model.forward_tokens(y, mask) for y in (x, painted(x, hidden)))
        assert torch.equal(a.visible[:, 1:], ~hidden)
        torch.testing.assert_close(a.x[a.visible], b.x[a.visible], atol=2e-5, rtol=1e-4)


POOLINGS = [name for name in ("deit", "avgmax", "max", "map", "map_with_class", "prr", "gap_with_class", "eva_giant",
                              "pe_like", "distilled") if name in backbone_names()]  # fmt: skip


@pytest.mark.parametrize("backbone", POOLINGS)
@torch.no_grad()
def test_with_nothing_removed_the_masked_model_is_the_unpatched_one(backbone):
    """Hidden tokens are computed and pooled as before, whatever the pooling."""
    model, hidden = build(backbone), hidden_patches()
    x, mask = images(model, batch=5), mask_of(hidden, model.num_prefix_tokens, "B11N bool")
    plain = model.forward_head(model.forward_features(x, attn_mask=mask))
    for method in METHODS:
        if not serves(method, model) or method == "ats":  # it always samples
            continue
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x, attn_mask=mask), plain, atol=1e-5, rtol=1e-5, msg=method)


@pytest.mark.parametrize("backbone", ["deit", "gap", "eva02"])
@pytest.mark.parametrize("method", PRUNE)
@torch.no_grad()
def test_hidden_patches_go_first(models, backbone, method):
    """Of v visible patches min(v, count) stay, after every block."""
    model, hidden = models[backbone], hidden_patches()
    prefix = model.num_prefix_tokens
    with tokenzoo.patched(model, method, **PRUNE[method], layers=(0, 1, 2, 3)):
        mask = mask_of(hidden, prefix, "diagonal inf")
        for tokens in model.walk(images(model, batch=5), mask):
            left = tokens.visible[:, prefix:].sum(1)
            assert torch.equal(left, (~hidden).sum(1).clamp(max=tokens.num_patches))
            assert tokens.valid is None
            places = tokens.original_positions()
            assert torch.equal(tokens.visible[:, prefix:], ~hidden.gather(1, places[:, prefix:] - prefix))


@pytest.mark.parametrize("method", FOLLOW)
@torch.no_grad()
def test_all_forms_of_a_mask_say_the_same(models, method):
    model, hidden = models["deit"], hidden_patches()[3:4].expand(3, -1)
    x = images(model)
    with tokenzoo.patched(model, given(method)):
        outs = [model(x, attn_mask=mask_of(hidden, 1, form)) for form in [*FORMS, "NN bool", "NN inf", "NN min"]]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-4)


# ---- masks that say more than hidden or not


def uneven_masks(n: int) -> dict[str, Tensor]:
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    local = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 4
    heads = torch.ones(1, 2, 1, n, dtype=torch.bool)
    heads[:, 0, :, 4] = False
    class_only = torch.eye(n, dtype=torch.bool)
    class_only[0] = class_only[:, 0] = True
    some = torch.ones(3, n, n, dtype=torch.bool)
    some[1, 5, 0] = False  # one patch of one image does not see the class token
    return {"causal": causal, "local": local, "heads": heads, "class only": class_only, "no class": some}


@pytest.mark.parametrize("method", FOLLOW)
@torch.no_grad()
def test_masks_by_query_need_a_method_that_only_drops_tokens(models, method):
    model = models["deit"]
    x = images(model)
    with tokenzoo.patched(model, given(method)):
        for name, mask in uneven_masks(17).items():
            for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
                if method in MIX:
                    with pytest.raises(ValueError, match=f"attn_mask shows patches to some .*{method}.* only drops"):
                        model(x, attn_mask=form)
                else:
                    assert model(x, attn_mask=form).isfinite().all(), name


@pytest.mark.parametrize("method", FOLLOW)
@torch.no_grad()
def test_even_masks_with_a_row_for_each_query_are_followed(models, method):
    """Biases that hide nothing, and what only prefix tokens or hidden ones do, stop no method."""
    model = models["deit"]
    x, n = images(model), 17
    distance = -(torch.arange(n)[:, None] - torch.arange(n)).abs().float()
    blind = torch.ones(n, n, dtype=torch.bool)
    blind[1:, 0] = False  # patches do not see the class token
    with tokenzoo.patched(model, given(method)):
        for mask in (distance, distance * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1), blind):
            tokens = model.forward_tokens(x, mask)
            assert tokens.x.isfinite().all()
            assert tokens.visible[tokens.valid if tokens.valid is not None else slice(None)].all()
        assert not torch.allclose(model(x, attn_mask=distance), model(x), atol=1e-4)


@torch.no_grad()
def test_super_tokens_refuse_every_mask(models):
    model = models["deit"]
    with tokenzoo.patched(model, given("sta")), pytest.raises(ValueError, match="no attn_mask covers"):
        model(images(model), attn_mask=mask_of(hidden_patches()[:3], 1, "B11N bool"))


@torch.no_grad()
def test_graphs_of_patches_refuse_masks(models):
    model = models["deit"]
    options = {"start": "farthest", "cost": "cluster", "space": "spectral"}
    with tokenzoo.patched(model, "kmedoids", keep_rate=0.6, **options):
        with pytest.raises(ValueError, match="kmedoids at block 1: .*spectral.* mask"):
            model(images(model), attn_mask=mask_of(hidden_patches()[:3], 1, "B11N bool"))


@torch.no_grad()
def test_maps_that_know_no_mask_are_refused(models):
    """A method of a user's own whose map cannot leave hidden tokens out."""
    from tokenzoo.maps import MixMap

    mix = MixMap(torch.rand(2, 3, 6))
    assert Tokens(torch.randn(2, 6, 4), Layout(1, True, (1, 5))).reduce(mix).length == 3
    with pytest.raises(ValueError, match="MixMap mixes tokens that attn_mask hides"):
        mix.masked(torch.ones(2, 6, dtype=torch.bool))


@torch.no_grad()
def test_blocks_by_hand_follow_a_mask(models):
    model, hidden = models["deit"], hidden_patches()
    x, mask = images(model, batch=5), mask_of(hidden, 1, "BNN bool")[:, None]

    def by_hand(images: Tensor) -> Tensor:
        y = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks:
            y = block(y, attn_mask=mask)
        return model.norm(y)

    with tokenzoo.patched(model, "tome", r=3):
        whole = model.forward_tokens(x, mask)
        torch.testing.assert_close(by_hand(x), whole.x)
        torch.testing.assert_close(by_hand(painted(x, hidden))[:, 0], whole.x[:, 0], atol=2e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="ReducingVitBlock: attn_mask.* tome .*only drops"):
            model.blocks[0](torch.randn(2, 17, 32), attn_mask=torch.ones(17, 17, dtype=torch.bool).tril())
        late = model.blocks[0](torch.randn(2, 17, 32))
        with pytest.raises(ValueError, match="give all blocks the same mask"):
            model.blocks[1](late, attn_mask=mask[:2])


# ---- references and graphs


def tome_by_loop(metric: Tensor, x: Tensor, size: Tensor, visible: Tensor, r: int) -> list[tuple[Tensor, float]]:
    """Value and size of every visible token of one image without a prefix after ToMe, as sets and loops."""
    unit = metric / metric.norm(dim=1, keepdim=True)
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    seen_odd = [j for j in odd if visible[j]]
    rank = []
    for i in even:
        score = float("inf") if not visible[i] else max((float(unit[i] @ unit[j]) for j in seen_odd), default=-9.0)
        rank.append((score, i))
    gone = [i for _, i in sorted(rank, reverse=True)[:r]]
    groups = {i: [i] for i in range(len(x)) if i not in gone and visible[i]}
    loose = []
    for i in gone:
        if not visible[i]:
            continue
        if seen_odd:
            groups[max(seen_odd, key=lambda j: float(unit[i] @ unit[j]))].append(i)
        else:
            loose.append(i)  # takes the place of a hidden token
    found = [(members, sum(float(size[m]) for m in members)) for members in [*groups.values(), *([m] for m in loose)]]
    return [(sum(x[m] * float(size[m]) for m in members) / total, total) for members, total in found]


@pytest.mark.parametrize("seed", range(6))
def test_tome_with_hidden_tokens_is_the_loop(seed):
    from tokenzoo.ops.matching.bipartite import bipartite_pairs

    g = torch.Generator().manual_seed(seed)
    n, r = 12, (seed % 3) + 2
    x, size = torch.randn(4, n, 5, generator=g), torch.randint(1, 4, (4, n, 1), generator=g).float()
    visible = torch.rand(4, n, generator=g) < 0.6
    visible[0] = torch.arange(n) % 2 == 1
    visible[1, 1::2], visible[1, 0] = True, False
    pairs = bipartite_pairs(x, r, 0, visible=visible)
    token_map = MergeMap(pairs.order, pairs.src, pairs.slot, n, size).masked(visible)
    after = token_map.pool(visible.unsqueeze(-1).float()).squeeze(-1) > 0
    got, mass = token_map.apply(x), token_map.pool(size * visible.unsqueeze(-1))
    for b in range(4):
        expected = tome_by_loop(x[b], x[b], size[b, :, 0], visible[b], r)
        ours = torch.cat([got[b][after[b]], mass[b][after[b]]], dim=1)
        wanted = torch.stack([torch.cat([value, torch.tensor([total])]) for value, total in expected])
        near = torch.cdist(ours, wanted)
        assert len(ours) == len(wanted) and (near.amin(0) < 1e-4).all() and (near.amin(1) < 1e-4).all()
        # a visible group stands at a visible place
        assert visible[b][token_map.heads[b][after[b]]].all()


@torch.no_grad()
def test_compiled_and_exported_models_follow_masks():
    torch.manual_seed(0)
    model, hidden = VIT(depth=2).eval(), hidden_patches()[:3]
    x, mask = images(model), mask_of(hidden, 1, "BNN bool")
    tokenzoo.patch_model(model, [{"method": "tome", "r": 2, "layers": 0}, {"method": "evit", "layers": 1}])
    want = model(x, attn_mask=mask)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, attn_mask=mask), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="attn_mask shows patches"):
        compiled(x, attn_mask=torch.ones(3, 17, 17, dtype=torch.bool).tril())
    program = torch.export.export(model, (x,), {"attn_mask": mask})
    torch.testing.assert_close(program.module()(x, attn_mask=mask), want, atol=1e-5, rtol=1e-5)


def test_every_method_is_covered():
    assert set(ZOO) == set(EVERY) and set(FOLLOW) | {"sta"} == set(METHODS) and "topk" not in MIX
