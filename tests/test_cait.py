"""CaiT: heads that talk, and a class token that enters behind the blocks that methods act in."""

import copy

import pytest
import timm
import torch
from cases import METHODS, build, given, images, serves
from test_map_properties import make

import tokenzoo
from tokenzoo.core.joining import join_front
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.evaluation.runs import forward_counted
from tokenzoo.maps import FrontedMap, MergeMap
from tokenzoo.ops.attention import Heads, attend, attention_received, attention_rows, key_bias
from tokenzoo.ops.talking import Talk
from tokenzoo.training.token_distillation import full_layout, patch_tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def talking(heads=4, width=8, length=9, fused=False):
    torch.manual_seed(0)
    talk = Talk(torch.nn.Linear(heads, heads), torch.nn.Linear(heads, heads))
    q, k, v = (torch.randn(2, heads, length, width) for _ in range(3))
    return Heads(q, k, v, width**-0.5, fused=fused, talk=talk)


@torch.no_grad()
def test_a_token_counts_as_often_as_its_size_says():
    """Three equal tokens, and one of size three: the constant of the second mixing too."""
    heads = talking()
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6])
    whole = Heads(*(t[:, :, rows] for t in heads[:3]), *heads[3:])
    size = torch.ones(2, 7, 1)
    size[:, 6] = 3
    merged = Heads(*(t[:, :, :7] for t in heads[:3]), *heads[3:])
    bias = key_bias(size, None)
    torch.testing.assert_close(attend(merged, bias), attend(whole)[:, :7], **CLOSE)
    received = attention_received(merged._replace(q=whole.q), bias)
    full = attention_received(whole)
    torch.testing.assert_close(received[:, :6], full[:, :6], **CLOSE)
    torch.testing.assert_close(received[:, 6], full[:, 6:].sum(1), **CLOSE)


@torch.no_grad()
def test_padding_gives_nothing():
    heads, valid = talking(), torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    real = Heads(*(t[:, :, :6] for t in heads[:3]), *heads[3:])
    torch.testing.assert_close(attend(heads, key_bias(None, valid))[:, :6], attend(real), **CLOSE)
    rows = attention_rows(heads, 0, 6, key_bias(None, valid))
    assert (rows[..., 6:] == 0).all() and torch.allclose(rows.sum(-1), torch.ones(()))


@pytest.mark.parametrize("form", ["keep", "keep_padded", "merge_weighted", "merge_dropped", "fuse", "gate", "chain"])
def test_maps_behind_tokens_in_front(form):
    inner = make(form, 12, 3)
    token_map, x = FrontedMap(inner, 2), torch.randn(2, 14, 3, dtype=torch.float64)
    out, matrix = token_map.apply(x), token_map.matrix().double()
    torch.testing.assert_close(out, matrix @ x)
    assert torch.equal(out[:, :2], x[:, :2]) and torch.equal(out[:, 2:], inner.apply(x[:, 2:]))
    member = token_map.membership()
    assert torch.equal(member[:, 2:, 2:], inner.membership()) and (member[:, :2].sum(2) == 1).all()
    torch.testing.assert_close(token_map.pool(x)[:, 2:], inner.pool(x[:, 2:]))
    stash = torch.randn(2, 14, 3, dtype=torch.float64)
    back = token_map.lift(out, stash)
    assert torch.equal(back[:, :2], x[:, :2]) and torch.equal(back[:, 2:], inner.lift(out[:, 2:], stash[:, 2:]))
    assert torch.equal(token_map.assign[:, 2:] >= 0, inner.assign >= 0) and token_map.n_out == inner.n_out + 2
    shares = token_map.shares(torch.float64)
    assert (shares is None) == (inner.shares(torch.float64) is None) and (shares is None or (shares[:, :2] == 1).all())
    assert torch.equal(token_map.dropped[:, 2:], inner.dropped) and not token_map.dropped[:, :2].any()


def test_side_data_of_tokens_that_join():
    layout = Layout(0, False, (3, 4), track_size=True, track_positions=True, keep_values=True)
    tokens = Tokens(torch.randn(2, 12, 5), layout, trace=(), scores=torch.rand(2, 12))
    order = torch.arange(12).expand(2, -1)
    slot = torch.zeros(2, 2, dtype=torch.int64)
    tokens = tokens.reduce(MergeMap(order[:, :10], order[:, 10:], slot, 12), 0, "x")
    joined = join_front(tokens, torch.zeros(2, 1, 5), has_class=True)
    assert joined.layout.num_prefix == 1 and joined.layout.has_class and joined.length == 11
    assert joined.size[:, 0].eq(1).all() and joined.size.sum() == 2 * 13 and joined.num_patches == 10
    assert joined.positions.tolist() == [list(range(11))] * 2 and joined.scores[:, 0].eq(0).all()
    assert joined.trace[0].prefix == 1 and joined.trace[0].map.n_in == 13


@torch.no_grad()
def test_merging_equal_patches_changes_nothing():
    """Images of one colour without positions, all patches equal: sizes reach talking heads and class attention."""
    model = build("cait_avg")
    model.pos_embed.zero_()
    x = torch.ones(2, 3, 32, 32) * torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    for pool in ("token", "avg"):
        model.global_pool = pool
        plain = model(x)
        with tokenzoo.patched(model, "tome", r=3):
            assert model.forward_tokens(x).length == 1 + 16 - 12
            torch.testing.assert_close(model(x), plain, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ats",)])
@torch.no_grad()
def test_low_precision_with_nothing_removed(method):
    model = build("cait").bfloat16()
    x = images(model).bfloat16()
    plain = model(x)
    with tokenzoo.patched(model, given(method, "zero")):
        torch.testing.assert_close(model(x), plain, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("method", ["tome", "topk", "mctf", "algm", "tomesd"])
def test_checkpointed_gradients_and_copies(method):
    grads = []
    for checkpointing in (False, True):
        model = build("cait").train()
        tokenzoo.patch_model(model, given(method))
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(images(model)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)
    model = model.eval()
    assert torch.equal(copy.deepcopy(model)(images(model)), model(images(model)))


@torch.no_grad()
def test_released_shapes_and_poolings():
    model = timm.create_model("cait_xxs24_224", depth=2, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    tokenzoo.patch_model(model, "tome", r=2)
    assert model(x).shape == plain.shape and "unfused, log-size bias" in str(tokenzoo.report(model))
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x), **CLOSE)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4)] * 2
    tokenzoo.unpatch_model(model)
    pruned = timm.create_model("cait_xxs24_224", depth=3, img_size=64, features_only=True, out_indices=(0, 1)).eval()
    plain = pruned(x)
    tokenzoo.patch_model(pruned, "topk", keep_rate=0.5)
    assert [f.shape for f in pruned(x)] == [f.shape for f in plain]
    assert [row.block for row in tokenzoo.report(pruned).rows if row.block is not None] == [0, 1]


@torch.no_grad()
def test_hidden_patches_are_no_keys_of_the_class_token():
    model = build("cait")
    x, mask = images(model), torch.ones(3, 1, 1, 16, dtype=torch.bool)
    mask[..., 4:8] = False
    other = x.clone()
    other[..., 8:16, :] += 3.0  # the second row of patches
    for method in ("tome", "evit", "random"):
        assert serves(method, model)
        with tokenzoo.patched(model, given(method)):
            torch.testing.assert_close(model(x, attn_mask=mask), model(other, attn_mask=mask), **CLOSE)
            assert not torch.allclose(model(x), model(other), atol=1e-3)


@torch.no_grad()
def test_explained_and_distilled():
    """Grids in front of the class token and behind it; a teacher's tokens at their places."""
    model, plain, outs = build("cait"), build("cait"), {}
    x = images(model)

    def keep(module, args, out):
        outs[module] = out

    for one in (model, plain):
        for name in ("blocks.2", "norm"):
            one.get_submodule(name).register_forward_hook(keep)
    for method, options in (("tome", {"r": 2}), ("topk", {"keep_rate": 1.0})):
        with tokenzoo.patched(model, method, **options), tokenzoo.explain(model) as seen:
            model(x)
            for name in ("blocks.2", "norm"):
                out = outs[model.get_submodule(name)]
                assert seen.activation(out, name).shape == (3, 32, 4, 4)
                gradient, count = seen.gradient(torch.ones_like(out), name), float(out.shape[1] - (name == "norm"))
                torch.testing.assert_close(gradient.sum((2, 3)), torch.full((3, 32), count))
    with tokenzoo.explain(plain) as seen:
        plain(x)
        found = seen.activation(outs[plain.norm], "norm").flatten(2).transpose(1, 2)
        assert torch.equal(found, outs[plain.norm][:, 1:])
    layout = full_layout(plain, x)
    assert layout.num_prefix == 1 and patch_tokens(plain.forward_features(x), layout).shape == (3, 16, 32)
    assert forward_counted(plain, x)[1].tolist() == [17] * 3
    with tokenzoo.patched(model, "tome", r=2):
        assert forward_counted(model, x)[1].tolist() == [9] * 3


@torch.no_grad()
def test_compiled_and_exported():
    model = build("cait")
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


def test_refusals():
    model = build("cait")
    with pytest.raises(ValueError, match="ats .* class token"):
        tokenzoo.patch_model(model, "ats")
    model.blocks_token_only[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match="blocks_token_only.1 has hooks"):
        tokenzoo.patch_model(model, "tome", r=1)
    model = build("cait")
    model.blocks_token_only[0].attn.__class__ = type("Mine", (type(model.blocks_token_only[0].attn),), {})
    with pytest.raises(ValueError, match="blocks_token_only.0.attn is .*Mine"):
        tokenzoo.patch_model(model, "tome", r=1)
    assert not tokenzoo.is_patched(model)
