"""Models in stages (PiT, LeViT, Hiera): each begins anew on its own grid, and what stands between sees all places."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from cases import KEEPS_LENGTH, METHODS, given, shaken
from timm.models.hiera import Hiera
from timm.models.levit import Attention, Levit, LevitDistilled
from timm.models.pit import PoolingVisionTransformer
from torch import nn

import tokenzoo
from tokenzoo.adapters.levit.model import resolution_of
from tokenzoo.core.lift import lift

PIT = partial(
    PoolingVisionTransformer, img_size=64, patch_size=8, stride=8, base_dims=(16, 16, 16), depth=(2, 1, 1),
    heads=(1, 2, 2), mlp_ratio=2, num_classes=7,
)  # fmt: skip
LEVIT = partial(
    Levit, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(2, 2), num_heads=(2, 3), stem_type="s8", num_classes=7,
)  # fmt: skip
HIERA = partial(
    Hiera, img_size=64, embed_dim=8, stages=(1, 3, 3), q_pool=2, mask_unit_size=(4, 4), num_classes=7, mlp_ratio=2,
    mask_unit_attn=(True, False, False),
)  # fmt: skip
MODELS = {
    "pit": PIT,
    "pit_distilled": partial(PIT, distilled=True),
    "pit_overlapping": partial(PIT, img_size=60, stride=4, depth=(2, 2)),  # 14 x 14 places
    "levit": LEVIT,
    "levit_distilled": partial(
        LevitDistilled, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(2, 2), num_heads=(2, 3), stem_type="s8",
        num_classes=7,
    ),
    "hiera": HIERA,
    "hiera_windows": partial(
        HIERA, abs_win_pos_embed=True, global_pos_size=(3, 3), use_expand_proj=False, init_values=0.3, global_pool="max"
    ),
}  # fmt: skip
# what no stage of these has room for, and what one block further would be in the next stage
OPTIONS = {"tome": {"r": 1}, "tofu": {"r": 1}, "turbo": {"r": 1}, "gtp": {"r": 1}, "mctf": {"r": 1, "min_tokens": 2},
           "flowcut": {"layers": (0, 1)}, "vggt": {"layers": (0, 1)}}  # fmt: skip
LAYERS = {"reconstruct": {"layers": 1}}
SIZE = {"pit_overlapping": (60, 60)}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def micro(name, seed=0):
    torch.manual_seed(seed)
    model = shaken(MODELS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bn.weight" in key:
                parameter.uniform_(0.5, 1.5)
            elif name.startswith("levit") and parameter.dim() > 1:
                parameter.mul_(0.4 if "biases" not in key else 3.0)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(name, batch=3, seed=1):
    return torch.randn(batch, 3, *SIZE.get(name, (64, 64)), generator=torch.Generator().manual_seed(seed))


def recipe(method, kind):
    found = given(method, kind, **(OPTIONS.get(method, {}) if kind != "zero" else {}))
    if method == "reconstruct":
        found[1].update(LAYERS[method])
    return found


def serves(method, name):
    if method == "cts":
        return False  # images of half the size
    return method != "ats" or name.startswith("pit")


pairs = pytest.mark.parametrize(
    "name,method", [(name, method) for name in MODELS for method in METHODS if serves(method, name)]
)


@pytest.fixture(scope="module")
def models():
    return {name: micro(name) for name in MODELS}


@pairs
@torch.no_grad()
def test_zero_reduction_changes_nothing(models, name, method):
    model, x = models[name], images(name)
    plain, features, maps = model(x), model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    if method != "ats":  # it has no strength zero
        with tokenzoo.patched(model, recipe(method, "zero")):
            torch.testing.assert_close(model(x), plain, **CLOSE)
            torch.testing.assert_close(model.forward_features(x), features, **CLOSE)
            final, lifted = model.forward_intermediates(x)
            torch.testing.assert_close(final, features, **CLOSE)
            for ours, theirs in zip(lifted, maps):
                torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(model(x), plain) and type(model).__module__.startswith("timm")


@pairs
@torch.no_grad()
def test_reduction_and_undoing(models, name, method):
    model, x = models[name], images(name)
    plain, keys = model(x), list(model.state_dict())
    shapes = [m.shape for m in model.forward_intermediates(x, intermediates_only=True)]
    tokenzoo.patch_model(model, recipe(method, "reduce"))
    try:
        out, tokens, report = model(x), model.forward_tokens(x), tokenzoo.report(model)
        assert out.shape == plain.shape and out.isfinite().all() and not torch.equal(out, plain)
        if report.data_dependent:
            assert tokens.length <= report.tokens_out
        else:
            assert tokens.length == report.tokens_out
        walked = [t for t in model.walk(x)]
        firsts = model.firsts()
        assert len(walked) == len(model.served_blocks) + len(firsts)
        assert [t.layout.grid for t in walked][-1] == tokens.layout.grid != walked[0].layout.grid
        assert method in KEEPS_LENGTH or min(t.length for t in walked[: firsts[1] + 1]) < walked[0].length
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), out, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.forward_head(tokens), out, atol=2e-5, rtol=1e-4)
        exact, wide = copy.deepcopy(model).double(), x.double()
        torch.testing.assert_close(torch.cat([exact(image[None]) for image in wide]), exact(wide), atol=2e-5, rtol=1e-4)
        assert [m.shape for m in model.forward_intermediates(x, intermediates_only=True)] == shapes
        (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(first, model.forward_intermediates(x, intermediates_only=True)[0])
        assert list(model.state_dict()) == keys
        again = tokenzoo.recipe(model)
    finally:
        tokenzoo.unpatch_model(model)
    with tokenzoo.patched(model, {**again, "dense": True}):
        dense = model.forward_features(x)
        assert dense.shape[1] == model.num_prefix_tokens + tokens.layout.num_patches
        torch.testing.assert_close(model.forward_head(dense), model(x), atol=2e-5, rtol=1e-4)
    assert torch.equal(model(x), plain)
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@pairs
def test_formula_is_what_tracing_counts(models, name, method):
    model, size = models[name], (3, *SIZE.get(name, (64, 64)))
    assert tokenzoo.report(model).total == tokenzoo.count_macs(model, size).total
    with tokenzoo.patched(model, recipe(method, "static")):
        report, traced = tokenzoo.report(model), tokenzoo.count_macs(model, size)
        assert report.total == pytest.approx(traced.total, rel=0.01)
        blocks = [row.macs for row in report.rows if row.block is not None]
        assert [macs for _, macs in traced.rows[:-1]] == pytest.approx(blocks, rel=0.05)


@pytest.mark.parametrize("fill", ["stash", "zero"])
@pytest.mark.parametrize("method", ["tome", "topk", "evit"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_stage_begins_with_what_the_model_makes_of_all_places(models, name, method, fill):
    model, x = models[name], images(name, 2)
    plain = copy.deepcopy(model)
    with tokenzoo.patched(model, recipe(method, "reduce"), fill=fill):
        walked, stage = list(model.walk(x)), 1
        left, entered = walked[model.firsts()[1]], walked[model.firsts()[1] + 1]
    full = lift(left.x, left.trace, fill)
    if name.startswith("pit"):
        own, grid = plain.num_tokens, left.layout.grid
        places = full[:, own:].transpose(1, 2).unflatten(2, grid)
        places, own = plain.transformers[stage].pool(places, full[:, :own])
        expected = torch.cat([own, places.flatten(2).transpose(1, 2)], dim=1)
    elif name.startswith("hiera"):
        places = full.unflatten(1, left.layout.grid)
        cells = [places[:, i::2, j::2].flatten(1, 2) for i in (0, 1) for j in (0, 1)]
        expected = plain.blocks[4](torch.cat(cells, dim=1))
    else:
        expected = plain.stages[stage].downsample(full)
    torch.testing.assert_close(entered.x, expected, **CLOSE)
    assert entered.trace == () and entered.size is None and entered.positions is None


@torch.no_grad()
def test_bias_by_place_is_gathered():
    """LeViT: dropping patches is masking them as keys, with the bias of the places that stay."""
    model = micro("levit").double()
    x = images("levit", 2).double()
    tokenzoo.patch_model(model, "random", keep_rate=0.5, layers=(0,))
    walked = list(model.walk(x))
    block, tokens = model.blocks[1], walked[1]
    at = tokens.positions
    bias = block.attn.attention_biases[:, block.attn.attention_bias_idxs]
    for image in range(2):
        own = at[image]
        rows = block.attn.qkv(tokens.x[image][None])[0].unflatten(1, (2, -1)).transpose(0, 1)
        q, k, v = rows.split([8, 8, 16], dim=2)
        maps = (q @ k.transpose(1, 2) * block.attn.scale + bias[:, own][:, :, own]).softmax(-1)
        h = tokens.x[image] + block.attn.proj((maps @ v).transpose(0, 1).flatten(1)[None])[0]
        h = h + block.mlp(h[None])[0]
        torch.testing.assert_close(walked[2].x[image], h, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_the_mean_weighs_by_size():
    model, x = micro("levit"), images("levit")
    tokenzoo.patch_model(model, "tome", r=1, mass_pool=True)
    *_, left = model.walk(x)
    pooled = (left.x * left.size).sum(1) / left.size.sum(1)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled, **CLOSE)
    torch.testing.assert_close(model(x), model.head(pooled), **CLOSE)


@pytest.mark.parametrize("method", ["tome", "evit", "mctf", "algm", "evo", "tomesd", "cluster"])
@pytest.mark.parametrize("name", ["pit", "levit_distilled", "hiera"])
def test_gradients_copies_threads_and_half_precision(name, method):
    model, x = micro(name).train(), images(name)
    tokenzoo.patch_model(model, recipe(method, "reduce"))
    model(x).square().mean().backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    if not name.startswith("pit"):
        again = micro(name).train()
        tokenzoo.patch_model(again, recipe(method, "reduce"))
        again.set_grad_checkpointing(True)
        again(x).square().mean().backward()
        for key, parameter in again.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[key], atol=1e-5, rtol=1e-3, msg=key)
    model = model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        assert all(torch.equal(m(x), expected) for m in (copy.deepcopy(model), torch.load(file, weights_only=False)))
        with ThreadPoolExecutor(3) as pool:  # gradients are a matter of threads
            run = torch.no_grad()(model.__call__)
            assert all(torch.equal(out, expected) for out in pool.map(run, [x] * 6))
        half = micro(name).bfloat16()
        plain = half(x.bfloat16())
        with tokenzoo.patched(half, recipe(method, "zero")):
            torch.testing.assert_close(half(x.bfloat16()), plain, atol=0.05, rtol=0.05)
        with tokenzoo.patched(half, recipe(method, "reduce")):
            assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["pit", "levit", "hiera"])
@torch.no_grad()
def test_pruned_and_other_heads(name):
    model, x = micro(name), images(name)
    tokenzoo.patch_model(model, "tome", r=1)
    every = model.forward_intermediates(x, intermediates_only=True)
    model.reset_classifier(5)
    assert model(x).shape == (3, 5)
    stages = len(every)
    left = len(model.stages_of_blocks()) - 1
    model.prune_intermediate_layers(list(range(stages - 1)))
    assert len(model.stages_of_blocks()) == left
    pruned = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, every))
    assert tokenzoo.report(model).tokens_out == model.forward_tokens(x).length


@torch.no_grad()
def test_released_shapes():
    for name, indices in (("pit_ti_224", (0, 1, 2)), ("levit_128s", (0, 1, 2)), ("hiera_tiny_224", (0, 1, 2, 3))):
        model = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=indices).eval()
        x = torch.randn(1, 3, 224, 224)
        shapes = [f.shape for f in model(x)]
        tokenzoo.patch_model(model, "topk", keep_rate=0.7)
        assert [f.shape for f in model(x)] == shapes
        tokenzoo.unpatch_model(model)
    for name, figure in (("pit_s_224", 2.9), ("hiera_tiny_224", 5), ("hiera_base_224", 9)):
        report = tokenzoo.report(timm.create_model(name))
        assert report.total / 1e9 == pytest.approx(figure, abs=0.1 if figure < 5 else 0.5)  # the papers' figures


def test_compiled_and_exported():
    for name in ("pit", "levit", "hiera"):
        model, x = micro(name), images(name)
        tokenzoo.patch_model(model, "tome", r=1)
        with torch.no_grad():
            expected = model(x)
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected, **CLOSE)
            torch._dynamo.reset()
            dims = {"x": {0: torch.export.Dim("batch", min=1, max=16)}}
            program = torch.export.export(model, (x,), dynamic_shapes=dims, strict=False).module()
            more = images(name, batch=5, seed=4)
            torch.testing.assert_close(program(more), model(more), atol=1e-4, rtol=1e-4)


def test_resolutions_are_read_off_older_layers():
    for grid in ((4, 4), (3, 5), (1, 1), (1, 6), (2, 2)):
        attn = Attention(16, 8, 2, resolution=grid)
        vars(attn).pop("resolution", None)
        assert resolution_of(attn) == grid


def test_refusals():
    for name, words in (("pit", "embedding of overlapping patches"), ("levit", "stem of convolutions")):
        model = micro(name)
        with pytest.raises(ValueError, match=f"cts embeds images at half the size, .*{words} cannot do"):
            tokenzoo.patch_model(model, "cts", shared=0)
        with pytest.raises(ValueError, match="reconstruct at block 2 comes after the stage"):
            tokenzoo.patch_model(model, given("reconstruct"))
        with pytest.raises(ValueError, match="protect=1"):
            tokenzoo.patch_model(model, "tome", r=1, protect=1)
        tokenzoo.patch_model(model, "tome", r=1)
        with pytest.raises(ValueError, match="takes no attn_mask"):
            model(images(name), attn_mask=torch.ones(64, 64))
        tokenzoo.unpatch_model(model)
        stage = next(iter(getattr(model, "transformers" if name == "pit" else "stages")))
        stage.register_forward_hook(lambda module, args, out: out)
        with pytest.raises(ValueError, match=r"\.0 has hooks"):
            tokenzoo.patch_model(model, "tome", r=1)
    with pytest.raises(ValueError, match="ats .* class token"):
        tokenzoo.patch_model(micro("levit"), "ats")
    with pytest.raises(ValueError, match="use_conv=True.*levit_256"):
        tokenzoo.patch_model(LEVIT(use_conv=True), "tome", r=1)


def test_what_is_refused_of_hiera():
    for settings, words in (
        ({"patch_drop_rate": 0.2}, "patch_drop_rate=0.2 drops random mask units"),
        ({"q_pool": 1}, "q_pool=1 has stages that are not half"),
        ({"mask_unit_attn": (True, True, True)}, "inside of mask units up to its end"),
        ({"stages": (1, 3, 1)}, "the only block of stage 2 pools"),
    ):
        with pytest.raises(ValueError, match=words):
            tokenzoo.patch_model(HIERA(**settings), "tome", r=1)
    model, x = micro("hiera"), images("hiera")
    with pytest.raises(ValueError, match="half the size, .*mask-unit stages cannot do"):
        tokenzoo.patch_model(model, "cts", shared=0)
    tokenzoo.patch_model(model, "tome", r=1)
    units = torch.ones(3, 16, dtype=torch.bool)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="drops whole mask units"):
            call(x, mask=units)
    with pytest.raises(ValueError, match="images of 64 x 64 pixels, not of 32 x 32"):
        model(x[..., :32, :32])
    with pytest.raises(ValueError, match="norm=True"):
        model.forward_intermediates(x, norm=True)
    with pytest.raises(ValueError, match="would end at blocks.4"):
        model.prune_intermediate_layers([4], coarse=False)
    with pytest.raises(ValueError, match="would end at blocks.0"):
        model.prune_intermediate_layers([0])


@torch.no_grad()
def test_every_block_of_hiera_hands_out_maps():
    """Blocks in front of the global stages and those that pool, too; and a model of global attention throughout."""
    for settings in ({}, {"mask_unit_attn": (False, False, False), "stages": (2, 2, 2)}):
        torch.manual_seed(0)
        model, x = shaken(HIERA(**settings)), images("hiera")
        plain, (features, maps) = model(x), model.forward_intermediates(x, coarse=False, output_fmt="NHWC")
        with tokenzoo.patched(model, "tome", r=0):
            assert len(model.served_blocks) == 4
            torch.testing.assert_close(model(x), plain, **CLOSE)
            again, lifted = model.forward_features(x, return_intermediates=True)
            torch.testing.assert_close(again, features, atol=1e-4, rtol=1e-4)
            final, lifted = model.forward_intermediates(x, coarse=False, output_fmt="NHWC")
            torch.testing.assert_close(final, features, atol=1e-4, rtol=1e-4)
            assert len(lifted) == len(maps)
            for ours, theirs in zip(lifted, maps):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            (only,) = model.forward_intermediates(x, indices=[4], coarse=False, intermediates_only=True)
            torch.testing.assert_close(only, maps[4].permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)


def test_images_stacked_in_rows_divide_the_grid_of_every_stage():
    model = micro("pit")
    with pytest.raises(ValueError, match="vggt at block 3: stride=2 is larger than the 1 x 2 patches"):
        tokenzoo.patch_model(model, "vggt")
    tokenzoo.patch_model(model, "vggt", layers=(0, 1, 2))
