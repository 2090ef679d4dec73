"""Vision towers of multimodal models in timm: projectors get the whole grid, maps stay maps, and EVA says the same."""

import copy
from functools import partial

import pytest
import timm
import torch
from cases import EVA, METHODS, build, given, images, serves, size_of
from torch import nn

import tokenzoo

pytest.importorskip("timm.models.qwen3_vit")
pytest.importorskip("timm.models.deepseek_vit")
pytest.importorskip("timm.models.gemma4_vit")
PROJECTED = ["qwen3_merge", "qwen3_enc", "deepseek_align", "deepseek_enc"]
ROWS = [*PROJECTED, "qwen3", "qwen3_enc_avg", "qwen3_enc_all", "deepseek"]
rows = pytest.mark.parametrize("name", ROWS)


def projector(model):
    tower = getattr(model, "encoder", model)
    return tower.merger if hasattr(tower, "merger") else tower.aligner


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("method", ["tome", "topk", "cluster", "sta"])
@torch.no_grad()
def test_the_projector_sees_every_patch(name, method):
    """As many tokens as before; each patch reads the one it went into."""
    model = build(name)
    x, count = images(model), []
    plain = model(x)
    handle = projector(model).register_forward_hook(lambda module, args, out: count.append((args[0], out)))
    tokenzoo.patch_model(model, given(method))
    out, tokens = model(x), model.forward_tokens(x, dense=True)
    (whole, made), *rest = count
    assert not rest and whole.shape[:3] == (3, 4, 4) and out.shape == plain.shape
    torch.testing.assert_close(whole.flatten(1, 2), model.lift_features(tokens))
    if name.endswith("_enc"):
        assert torch.equal(out, made)
        assert model.forward_features(x).shape == (3, 4, 4, 32)
    else:
        assert torch.equal(model.forward_features(x), made)
        torch.testing.assert_close(model.head(model.norm(made.mean(1))), out)
    handle.remove()


@torch.no_grad()
def test_maps_where_all_tokens_are_there():
    """Weighed by size all patches are; dropped ones are not, unless the recipe is dense."""
    for name in ("qwen3", "qwen3_enc_all", "deepseek"):
        model = build(name)
        x = images(model)
        plain = model.forward_features(x)
        assert plain.shape == (3, 4, 4, 32)
        left = 16 if name == "qwen3_enc_all" else 4
        for recipe, shape in (("uniform", (3, 4, 32)), ("pool", (3, 4, 4, 32) if left == 4 else (3, 4, 32))):
            with tokenzoo.patched(model, given(recipe)):
                assert model.forward_features(x).shape == shape
            with tokenzoo.patched(model, given(recipe), dense=True):
                assert model.forward_features(x).shape == plain.shape
                torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))


@rows
@torch.no_grad()
def test_other_sizes_and_positions(name):
    """Absolute positions are interpolated, rotary tables made anew, or rebuilt from mean coordinates."""
    model = build(name)
    x = torch.randn(2, 3, 48, 96, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    for options in ({"r": 0}, {"r": 0, "merged_positions": "mean"}):
        with tokenzoo.patched(model, "tome", **options):
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, "tome", r=3):
        tokens = model.forward_tokens(x)
        assert tokens.layout.grid == (6, 12) and tokens.length == 72 - 12 and tokens.positions is not None
        kept = model(x)
        assert kept.shape == plain.shape or name == "qwen3_enc_all"
    with tokenzoo.patched(model, "tome", r=3, merged_positions="mean"):
        assert model(x).shape != plain.shape or not torch.allclose(model(x), kept, atol=1e-5)


@pytest.mark.parametrize("name", [*ROWS, "gemma4", "gemma4_soft"])
def test_gradients_copies_and_number_formats(name):
    model = build(name)
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-5, msg=key)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@rows
@torch.no_grad()
def test_pruned_and_reset(name):
    model = build(name)
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    taps = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert [tap.shape for tap in taps] == [(3, 32, 4, 4)] * 2
    wrapped = timm.models._features.FeatureGetterNet(copy.deepcopy(model), out_indices=(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(wrapped(x), taps))
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(3)
        assert model(x).shape == (3, 3)
    model.prune_intermediate_layers([1])
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(pruned[0], taps[0]) and len(tokenzoo.report(model).rows) == 4
    assert model(x).shape[-1] == 32
    tokenzoo.unpatch_model(model)
    assert model(x).shape[-1] == 32


@pytest.mark.parametrize("name", ["qwen3", "deepseek_align"])
@torch.no_grad()
def test_one_graph(name):
    model = build(name)
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_names_and_refusals():
    model = build("qwen3")
    assert [row.name for row in tokenzoo.report(model).rows][1] == "encoder.blocks.0"
    assert tokenzoo.count_macs(model, (3, *size_of(model))).rows[0][0] == "encoder.blocks.0"
    with pytest.raises(ValueError, match="protect=2.*Qwen3VitClassifier.*maps"):
        tokenzoo.patch_model(model, "tome", r=1, protect=2)
    model.encoder.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"encoder has hooks.*encoder.blocks\[i\]"):
        tokenzoo.patch_model(model, "tome", r=1)
    model = build("deepseek")
    model.encoder.blocks[1].attn.__class__ = type("Mine", (type(model.encoder.blocks[1].attn),), {})
    with pytest.raises(TypeError, match=r"encoder.blocks.1 attends with .*Mine"):
        tokenzoo.patch_model(model, "tome", r=1)


GEMMA = ["gemma4", "gemma4_soft", "gemma4_enc"]


@pytest.mark.parametrize("name", GEMMA)
@torch.no_grad()
def test_gemma(name):
    """Other sizes, blocks with timm's own tables, the pooler on all patches, and what is refused."""
    model = build(name)
    tower, x = getattr(model, "encoder", model), torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    plain, taps = model(x), model.forward_intermediates(x, indices=[1], intermediates_only=True)
    with tokenzoo.patched(model, "tome", r=0):
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
        same = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        torch.testing.assert_close(same[0], taps[0], atol=1e-5, rtol=1e-5)
    x = images(model)
    with tokenzoo.patched(model, "tome", r=2):
        tokens = model.forward_tokens(x, dense=True)
        z, places, _ = tower.patch_embed(x)
        tables = tower.rotary_emb(z, places)
        for block in tower.blocks:
            z = block(z, *tables)
        torch.testing.assert_close(z, tokens.x)
        if name != "gemma4":
            whole = tower.pooler(model.lift_features(tokens), places, None)[0]
            whole = whole if tower.std_bias is None else (whole - tower.std_bias) * tower.std_scale
            torch.testing.assert_close(model.forward_features(x) if name == "gemma4_soft" else model(x), whole)
        packed = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(x), 16, -1)
        for call in (model, model.forward_features, model.forward_intermediates, model.forward_tokens):
            for given in ({"patches": packed}, packed):
                with pytest.raises(ValueError, match="a batch of packed patches.*give images"):
                    call(given)
        with pytest.raises(ValueError, match="a batch of packed patches"):
            model(x, patch_coord=places)
    if name == "gemma4_enc":
        with tokenzoo.patched(model, "tome", r=2), pytest.raises(ValueError, match="do not tell the grid"):
            model.forward_head(model.forward_features(x))
    for options, words in (({"merged_positions": "mean"}, "Gemma4RotaryEmbedding2D"), ({}, "half the size")):
        with pytest.raises(ValueError, match=words):
            tokenzoo.patch_model(model, "tome" if options else "cts", **options)


@pytest.fixture(scope="module")
def twins():
    """A Qwen3 classifier, and an `Eva` with its weights."""
    model = build("qwen3")
    other = EVA(
        class_token=False, global_pool="avg", use_rot_pos_emb=True, rope_rotate_half=True, attn_type="rope",
        dynamic_img_size=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    weights = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert set(missing) == {"fc_norm.weight", "fc_norm.bias"} and not unexpected
    for block in other.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    return model, other.eval()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_same_weights_give_the_same_logits(twins, method):
    model, other = twins
    x = images(model)
    torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)
    if serves(method, model):
        with tokenzoo.patched(model, given(method)), tokenzoo.patched(other, given(method)):
            torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)
