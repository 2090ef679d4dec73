"""XCiT: attention among channels, convolutions on the full grid in every block, and a class token that enters late."""

import copy

import pytest
import timm
import torch
from cases import METHODS, build, given, images, serves
from torch import nn

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.ops import attention
from tokenzoo.ops.attention import Heads, attend, key_bias

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return micro()


def micro(name="xcit"):
    """Statistics of the norms on the grid are off their start too."""
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


SERVED = [method for method in METHODS if serves(method, build("xcit"))]
methods = pytest.mark.parametrize("method", SERVED)


def channels(length=9):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 8) for _ in range(3))
    return Heads(q, k, v, 1.0, fused=False, temperature=torch.rand(2, 1, 1) + 0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_counts_as_often_as_its_size_says(fused):
    heads = channels()._replace(fused=fused)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6])
    whole, merged = (heads._replace(**{n: getattr(heads, n)[:, :, r] for n in "qkv"}) for r in (rows, rows[:7]))
    size = torch.ones(2, 7, 1)
    size[:, 6] = 3
    torch.testing.assert_close(attend(merged, key_bias(size, None)), attend(whole)[:, :7], **CLOSE)
    valid = torch.arange(9).expand(2, -1) < 6
    real = heads._replace(**{n: getattr(heads, n)[:, :, :6] for n in "qkv"})
    torch.testing.assert_close(attend(heads, key_bias(None, valid))[:, :6], attend(real), **CLOSE)


def test_a_method_that_reads_attention_between_tokens_says_so(monkeypatch):
    """The trait, held against what is read on a model where it can be read."""
    seen, deciding = [], []
    rows, decide = attention.attention_rows, Step.decide

    def spied(*args, **kwargs):
        seen.append(1)
        return rows(*args, **kwargs)

    for module in (attention, tokenzoo.core.signals, tokenzoo.ops.map_reading):
        monkeypatch.setattr(module, "attention_rows", spied)
    monkeypatch.setattr(Step, "decide", lambda *args: deciding.append(1) or decide(*args))
    variants = {method: [given(method)] for method in METHODS}
    variants["kmedoids"].append({"method": "kmedoids", "keep_rate": 0.6, "start": "farthest", "cost": "cluster"})
    model = build("deit")
    x = images(model)
    for recipes in variants.values():
        for recipe in recipes:
            seen.clear()
            with torch.no_grad(), tokenzoo.patched(model, recipe):
                model(x)
                declared = any(m.reads_maps for m in model.tokenzoo_recipe.methods)
            assert declared == bool(seen), recipe
    assert deciding


def test_who_is_refused():
    model = build("xcit")
    for method in sorted(set(METHODS) - set(SERVED)):
        word = "half the size" if method == "cts" else "class token|attention between tokens"
        with pytest.raises(ValueError, match=f"{method} .*({word})"):
            tokenzoo.patch_model(model, given(method))
    assert {"tome", "pitome", "tofu", "atc", "dpcknn", "pool", "random", "algm", "tomesd", "cluster"} <= set(SERVED)
    tokenzoo.patch_model(model, "kmedoids", start="farthest", cost="cluster", layers=(1,))
    with pytest.raises(ValueError, match="among channels: an attn_mask"):
        model(images(model), attn_mask=torch.ones(16, 16))
    tokenzoo.unpatch_model(model)
    with pytest.raises(ValueError, match="protect=2"):
        tokenzoo.patch_model(model, "tome", r=1, protect=2)


@methods
@torch.no_grad()
def test_features_are_what_the_head_pools(model, method):
    for pool in ("token", "avg"):
        model.global_pool = pool
        x = images(model)
        plain = model(x)
        for more in ({}, {"dense": True}, {"fill": "zero"}):
            with tokenzoo.patched(model, given(method), **more):
                out, features = model(x), model.forward_features(x)
                torch.testing.assert_close(model.forward_head(features), out, atol=2e-5, rtol=1e-4)
                final, maps = model.forward_intermediates(x)
                torch.testing.assert_close(final, features, atol=2e-5, rtol=1e-4)
                assert [tuple(m.shape) for m in maps] == [(3, 32, 4, 4)] * 4
        assert torch.equal(model(x), plain)
    model.global_pool = "token"


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (112, 80)])
@methods
@torch.no_grad()
def test_other_sizes(model, method, size):
    if method == "vggt" and size == (112, 80):  # images stacked in rows
        return
    x = torch.randn(2, 3, *size)
    plain, features = model(x), model.forward_features(x)
    with tokenzoo.patched(model, given(method, "zero")):
        torch.testing.assert_close(model(x), plain, **CLOSE)
        torch.testing.assert_close(model.forward_features(x), features, **CLOSE)
    with tokenzoo.patched(model, given(method, "static")):
        report = tokenzoo.report(model, size)
        assert model.forward_tokens(x).length == report.tokens_out
        assert report.total == pytest.approx(tokenzoo.count_macs(model, (3, *size)).total, rel=0.01)


@pytest.mark.parametrize("fill", ["stash", "zero"])
@pytest.mark.parametrize("recipe", [
    {"method": "tome", "r": 3}, {"method": "random", "keep_rate": 0.6},
    [{"method": "tome", "r": 2}, {"method": "uniform", "keep_rate": 0.7, "layers": (1, 3)}],
], ids=["tome", "random", "both"])  # fmt: skip
@torch.no_grad()
def test_is_what_matrices_give(recipe, fill):
    """Every block written out: weighted sums among channels, and the grid by the matrices of the maps."""
    model = micro().double()
    x, plain = images(model, 2).double(), copy.deepcopy(model)
    tokenzoo.patch_model(model, recipe, fill=fill)
    walked = list(model.walk(x))
    h, maps = walked[0].x, []
    size = torch.ones(2, 16, 1, dtype=torch.float64)
    for index, block in enumerate(plain.blocks):
        weighs = model.tokenzoo_recipe.proportional
        q, k, v = block.attn.qkv(block.norm1(h)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 4, 1)
        weight = (size if weighs else torch.ones_like(size)).transpose(1, 2).unsqueeze(1)
        q, k = (t / (t.square() * weight).sum(-1, keepdim=True).sqrt() for t in (q, k))
        y = (((q * weight) @ k.transpose(2, 3)) * block.attn.temperature).softmax(-1) @ v
        h = h + block.gamma1 * block.attn.proj(y.permute(0, 3, 1, 2).flatten(2))
        z = block.norm3(h)
        for token_map, before in reversed(maps):
            assign = token_map.membership().transpose(1, 2).double()
            z = assign @ z
            if fill == "stash":
                z = torch.where(token_map.dropped.unsqueeze(2), block.norm3(before), z)
        z = block.local_mp(z, 4, 4)
        for token_map, _ in maps:
            z = token_map.matrix().double() @ z
        h = h + block.gamma3 * z
        for step in walked[-1].trace:
            if step.block == index:
                maps.append((step.map, h))
                h, size = step.map.matrix().double() @ h, step.map.pool(size)
        h = h + block.gamma2 * block.mlp(block.norm2(h))
        torch.testing.assert_close(walked[index + 1].x, h, atol=1e-6, rtol=1e-6)  # log sizes are float32


@torch.no_grad()
def test_the_class_token_weighs_by_size():
    model = micro()
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    *_, left = model.walk(x)
    got = model.forward_features(x)
    rows = torch.repeat_interleave(left.x[0], left.size[0, :, 0].long(), dim=0)[None]
    tokenzoo.unpatch_model(model)
    whole = torch.cat([model.cls_token, rows], dim=1)
    for block in model.cls_attn_blocks:
        whole = block(whole)
    torch.testing.assert_close(got[:1, 0], model.norm(whole)[:, 0], atol=2e-5, rtol=1e-4)


def test_dense_values_of_dropped_patches_go_through_the_end():
    """Dropped in the last block, they come back through all that class-attention blocks do to patches."""
    model = micro("xcit_avg")
    x = images(model)
    with torch.no_grad():
        plain = model.forward_features(x)
        model.blocks[3].mlp.fc2.weight.zero_()  # so that the MLP behind the drop adds nothing
        model.blocks[3].mlp.fc2.bias.zero_()
        plain = model.forward_features(x)
        with tokenzoo.patched(model, "random", keep_rate=0.5, layers=(3,), dense=True):
            torch.testing.assert_close(model.forward_features(x)[:, 1:], plain[:, 1:], **CLOSE)


@pytest.mark.parametrize("method", SERVED)
def test_gradients_copies_and_half_precision(method):
    grads = []
    for checkpointing in (False, True):
        model = micro().train()
        tokenzoo.patch_model(model, given(method, "static"))
        model.set_grad_checkpointing(checkpointing)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # else the second run in the backward pass would move statistics once more
        torch.manual_seed(3)
        model(images(model)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)
    model = model.eval()
    with torch.no_grad():
        x = images(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        tokenzoo.unpatch_model(model)
        half = model.bfloat16()
        plain = half(x.bfloat16())
        with tokenzoo.patched(half, given(method, "zero")):
            torch.testing.assert_close(half(x.bfloat16()), plain, atol=0.06, rtol=0.06)


@torch.no_grad()
def test_blocks_by_hand_and_hooks():
    model = micro()
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    *_, expected = model.walk(x)
    y, _ = model.embed(x)
    for block in model.blocks:
        y = block(y, 4, 4)
    torch.testing.assert_close(y, expected.x, **CLOSE)
    with pytest.raises(ValueError, match="grid of 2 x 8"):
        model.blocks[0](model.embed(x)[0], 2, 8)
    called = []
    for name in ("attn", "local_mp", "mlp"):
        model.blocks[2].get_submodule(name).register_forward_hook(lambda module, args, out: called.append(out.shape[1]))
    model(x)
    assert called == [12, 16, 10]


@torch.no_grad()
def test_released_shapes():
    model = timm.create_model("xcit_nano_12_p8_224", depth=2, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    tokenzoo.patch_model(model, "tome", r=8)
    report = tokenzoo.report(model)
    assert "unfused among channels (linear in tokens), log-size bias" in str(report) and report.attn_impl == "unfused"
    assert report.total == pytest.approx(tokenzoo.count_macs(model, (3, 64, 64)).total, rel=0.002)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    model.reset_classifier(1000, "token")
    tokenzoo.unpatch_model(model)
    getter = timm.create_model("xcit_nano_12_p16_224", depth=3, img_size=64, features_only=True, out_indices=(0, 1))
    shapes = [f.shape for f in getter.eval()(x)]
    tokenzoo.patch_model(getter, "random", keep_rate=0.5, layers=(1,))
    assert [f.shape for f in getter(x)] == shapes and plain.shape == (2, 1000)


@torch.no_grad()
def test_compiled_and_exported():
    model = micro()
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected, **CLOSE)
    torch._dynamo.reset()
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=16)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dims, strict=False).module()
    more = images(model, batch=5, seed=4)
    torch.testing.assert_close(program(more), model(more), atol=1e-4, rtol=1e-4)


def test_unknown_parts_are_refused():
    model = build("xcit")
    model.blocks[1].local_mp.__class__ = type("Mine", (type(model.blocks[1].local_mp),), {})
    with pytest.raises(TypeError, match="blocks.1 .*Mine"):
        tokenzoo.patch_model(model, "tome", r=1)
    assert not tokenzoo.is_patched(model)
