"""CrossViT: each branch by itself, class tokens exchanged over the patches that are left."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from cases import KEEPS_LENGTH, METHODS, given, shaken
from timm.models.crossvit import CrossVit
from torch import nn

import tokenzoo
from tokenzoo.core.lift import lift
from tokenzoo.evaluation.runs import forward_counted
from tokenzoo.view.maps import token_maps

BASE = partial(
    CrossVit, img_size=48, img_scale=(1.0, 32 / 48), patch_size=(6, 8), embed_dim=(16, 24), num_heads=(2, 2),
    depth=((1, 2, 0), (1, 2, 0)), mlp_ratio=(2.0, 2.0, 1.0), num_classes=7,
)  # fmt: skip
MODELS = {
    "crossvit": BASE,
    "crossvit_avg": partial(BASE, global_pool="avg", depth=((1, 1, 2), (1, 2, 1)), qkv_bias=False, crop_scale=True),
}
# what the branches of 65 and 17 tokens have room for; what begins in one branch ends there
OPTIONS = {"flowcut": {"layers": (0, 1)}, "reconstruct": {"layers": 1}, "vggt": {"layers": (0, 1)},
           "evo": {"layers": (1, 3)}, "kmedoids": {"layers": (1, 3)}}  # fmt: skip
SERVED = [method for method in METHODS if method != "cts"]
SIZE = (3, 48, 48)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
pairs = pytest.mark.parametrize("name,method", [(name, method) for name in MODELS for method in SERVED])


def micro(name="crossvit"):
    torch.manual_seed(0)
    return shaken(MODELS[name]())


def images(batch=3, seed=1):
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))


def recipe(method, kind="reduce"):
    found = given(method, kind, **(OPTIONS.get(method, {}) if method != "reconstruct" else {}))
    if method == "reconstruct":
        found[0].update(layers=0)
        found[1].update(OPTIONS[method])
    return found


@pytest.fixture(scope="module")
def models():
    return {name: micro(name) for name in MODELS}


def alike(got, expected, **close):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, **(close or CLOSE))


@pairs
@torch.no_grad()
def test_identity_reduction_and_undoing(models, name, method):
    model, x = models[name], images()
    plain, features, keys = model(x), model.forward_features(x), list(model.state_dict())
    newer = hasattr(model, "forward_intermediates")
    maps = model.forward_intermediates(x, intermediates_only=True) if newer else None
    if method != "ats":  # it has no strength zero
        with tokenzoo.patched(model, recipe(method, "zero")):
            torch.testing.assert_close(model(x), plain, **CLOSE)
            alike(model.forward_features(x), features)
            final, lifted = model.forward_intermediates(x)
            alike(final, features)
            if newer:
                alike(lifted, maps)
    tokenzoo.patch_model(model, recipe(method))
    try:
        out, tokens, report = model(x), model.forward_tokens(x, trace=True), tokenzoo.report(model)
        assert [len(t.x) for t in tokens] == [3, 3] and all(t.x.isfinite().all() for t in tokens)
        if report.data_dependent:
            assert tokens[-1].length <= report.tokens_out
        else:
            assert tokens[-1].length == report.tokens_out == forward_counted(model, x)[1].unique().item()
        assert method in KEEPS_LENGTH or min(t.length - n for t, n in zip(tokens, (65, 17))) < 0
        assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-6)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), out, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), out, atol=2e-5, rtol=1e-4)
        lifted = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[1:] for m in lifted] == [(16, 8, 8), (16, 8, 8), (24, 4, 4), (24, 4, 4)]
        short = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert [short[1].shape[1], short[3].shape[1]] == [t.num_patches for t in tokens]
        assert list(model.state_dict()) == keys
    finally:
        tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain) and type(model) is CrossVit
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("method", SERVED)
def test_formula_is_what_tracing_counts(models, method):
    model = models["crossvit"]
    assert tokenzoo.report(model).total == tokenzoo.count_macs(model, SIZE).total
    with tokenzoo.patched(model, recipe(method, "static")):
        report, traced = tokenzoo.report(model), tokenzoo.count_macs(model, SIZE)
        assert report.total == pytest.approx(traced.total, rel=0.01)
        blocks = [row.macs for row in report.rows if row.block is not None]
        assert [macs for _, macs in traced.rows[:-1]] == pytest.approx(blocks, rel=0.05)


@torch.no_grad()
def test_class_tokens_read_what_is_left_of_the_other_branch():
    """Written from the paper's equations: a merged token counts as the patches that it stands for."""
    model, x = micro(), images(1)
    plain = copy.deepcopy(model)
    tokenzoo.patch_model(model, "tome", r=2)
    walked = list(model.walk(x, trace=True))
    scale = plain.blocks[1]  # behind its blocks: what enters is the class token of blocks, which the walk hides
    _, branches = model.start(x, None, True, False)
    (_, branches), _ = (step for step in model._scales_run(branches))
    left = [tokens for tokens in branches]
    for branch, block in enumerate(model.blocks[1].blocks):
        for layer in block:
            left[branch] = layer(left[branch])
    for branch in range(2):
        own, other = left[branch], left[1 - branch]
        rows = torch.repeat_interleave(other.x[0], other.size[0, :, 0].long(), dim=0)[None]
        rows = torch.cat([scale.projs[branch](own.x[:, :1]), rows[:, 1:]], dim=1)
        back = scale.revert_projs[branch](scale.fusion[branch](rows)[:, :1])
        end = walked[6 // 2 - 1] if branch == 0 else walked[-1]  # two blocks and what enters, then four and that
        torch.testing.assert_close(end.x[:, :1], back, atol=2e-5, rtol=1e-4)
        assert torch.equal(end.x[:, 1:], own.x[:, 1:])


@pytest.mark.parametrize("method", ["tome", "evit", "mctf", "algm", "tomesd", "ats"])
def test_gradients_copies_threads_and_half_precision(method):
    model, x = micro().train(), images()
    tokenzoo.patch_model(model, recipe(method))
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        assert all(torch.equal(m(x), expected) for m in (copy.deepcopy(model), torch.load(file, weights_only=False)))
        with ThreadPoolExecutor(3) as pool:  # gradients are a matter of threads
            assert all(torch.equal(out, expected) for out in pool.map(torch.no_grad()(model.__call__), [x] * 6))
        half = micro().bfloat16()
        plain = half(x.bfloat16())
        if method != "ats":
            with tokenzoo.patched(half, recipe(method, "zero")):
                torch.testing.assert_close(half(x.bfloat16()), plain, atol=0.1, rtol=0.1)
        with tokenzoo.patched(half, recipe(method)):
            assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads_read_features_of_composed_recipes(models, name):
    model, x = models[name], images()
    soft = {"method": "cluster", "layers": 0, "where": "before", "scale": 0.5, "prop_attn": True}
    for composed in (
        given("tome", mass_pool=True),
        given("mctf"),
        given("algm", prop_attn=True),
        soft,
        [given("topk", layers=2), given("tome", r=1, layers=(1, 3), mass_pool=True)],
    ):
        for dense in (False, True):
            with tokenzoo.patched(model, composed, dense=dense):
                features = model.forward_features(x)
                torch.testing.assert_close(model.forward_head(features), model(x), **CLOSE)
                assert not dense or [f.shape[1] for f in features] == [65, 17]


@torch.no_grad()
def test_intermediates_pictures_and_heads():
    model, x = micro(), images()
    tokenzoo.patch_model(model, "topk", keep_rate=0.5, layers=(1, 3))
    every = model.forward_intermediates(x, intermediates_only=True)
    for take in ([0], [2], [1, 3]):
        stopped = model.forward_intermediates(x, take, stop_early=True, intermediates_only=True)
        assert len(stopped) == len(take) and all(torch.equal(a, every[i]) for a, i in zip(stopped, take))
    tokens = model.forward_tokens(x, trace=True, dense=True)
    normed = model.forward_intermediates(x, [1], norm=True, intermediates_only=True)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(normed, lift(tokens[0].x, tokens[0].trace, "stash", model.norm[0])[:, 1:], **CLOSE)
    assert token_maps(model, x).grid == (4, 4)  # of the longer story, the later branch where both are as long
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), **CLOSE)
    assert model(x).shape == (3, 5) and model.forward_head(model.forward_features(x), pre_logits=True).shape == (3, 40)
    small = torch.randn(2, 3, 32, 40)
    assert model(small).shape == (2, 5)  # scaled, as upstream


def test_budgets():
    model = micro()
    tokenzoo.patch_model(model, "tome", flops=0.8)
    assert tokenzoo.report(model).ratio == pytest.approx(0.8, abs=0.06)


def test_released_costs():
    report = tokenzoo.report(timm.create_model("crossvit_small_240"))
    assert report.total / 1e9 == pytest.approx(5.6, abs=0.1)  # the paper's figure


def test_compiled_and_exported():
    model, x = micro(), images()
    tokenzoo.patch_model(model, "tome", r=1)
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), **CLOSE)
        torch._dynamo.reset()
        dims = {"x": {0: torch.export.Dim("batch", min=1, max=16)}}
        program = torch.export.export(model, (x,), dynamic_shapes=dims, strict=False).module()
        torch.testing.assert_close(program(images(5, 4)), model(images(5, 4)), atol=1e-4, rtol=1e-4)


def test_refusals():
    model = micro()
    with pytest.raises(ValueError, match="cts embeds images at half the size, .*two embeddings"):
        tokenzoo.patch_model(model, "cts", shared=0)
    with pytest.raises(ValueError, match="reconstruct at block 2 comes after the stage"):
        tokenzoo.patch_model(model, given("reconstruct"))
    with pytest.raises(ValueError, match="evo at block 2 wants an importance .* leave 2 out of layers"):
        tokenzoo.patch_model(model, "evo")
    with pytest.raises(ValueError, match="protect=1"):
        tokenzoo.patch_model(model, "tome", r=1, protect=1)
    tokenzoo.patch_model(model, "tome", r=1)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        list(model.walk(images(), torch.ones(65, 65)))
    with pytest.raises(ValueError, match="unpatch it, prune it"):
        model.prune_intermediate_layers([0])
    tokenzoo.unpatch_model(model)
    handle = model.blocks[0].fusion[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match=r"blocks\.0\.fusion\.1 has hooks"):
        tokenzoo.patch_model(model, "tome", r=1)
    handle.remove()
    model.blocks[1].fusion[0].attn = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.1\.fusion\.0\.attn is torch.*CrossAttention alone"):
        tokenzoo.patch_model(model, "tome", r=1)
    with pytest.raises(ValueError, match=r"blocks\.1 lacks blocks of a branch"):
        tokenzoo.patch_model(BASE(depth=((1, 2, 0), (0, 2, 0))), "tome", r=1)
