"""Relative position biases follow the tokens: against attention written out here, from timm's own layers."""

import copy
import pickle

import pytest
import torch
from cases import build, given, images

import tokenzoo
from tokenzoo.adapters.masks import gather_places
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens

ROWS = ["beit", "beit_shared", "relpos_mlp", "relpos_bias", "relpos_shared"]
rows = pytest.mark.parametrize("name", ROWS)


def bias_of(model, index):
    """The bias of a block in original places [H, N, N], as timm makes it."""
    attn = model.blocks[index].attn
    if "Beit" in type(model).__name__:
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()[0]
        return own if model.rel_pos_bias is None else model.rel_pos_bias()
    return (attn.rel_pos if model.shared_rel_pos is None else model.shared_rel_pos).get_bias()[0]


def attended(attn, z, bias, size):
    """Attention of one image's tokens z [N, C], with the map [H, N, N]."""
    qkv = attn.qkv(z)
    if getattr(attn, "q_bias", None) is not None:
        qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = qkv.view(len(z), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    q, k = getattr(attn, "q_norm", torch.nn.Identity())(q), getattr(attn, "k_norm", torch.nn.Identity())(k)
    probs = (q @ k.transpose(1, 2) * attn.scale + bias + size.log()).softmax(-1)
    return attn.proj((probs @ v).transpose(0, 1).flatten(1)), probs


def halves(block):
    """The two branches of a block, around attention and MLP."""
    if hasattr(block, "gamma_1"):
        gammas = [1.0 if g is None else g for g in (block.gamma_1, block.gamma_2)]
        return block.norm1, lambda y: y * gammas[0], lambda x: gammas[1] * block.mlp(block.norm2(x))
    if hasattr(block, "ls1"):
        return block.norm1, block.ls1, lambda x: block.ls2(block.mlp(block.norm2(x)))
    return torch.nn.Identity(), block.norm1, lambda x: block.norm2(block.mlp(x))


def by_hand(model, x, trace, weighted):
    """All blocks on one image [1, 3, H, W], with the maps of a trace between attention and MLP [N, C]."""
    x = model._pos_embed(model.patch_embed(x))[0]
    at, size = torch.arange(len(x)), torch.ones(len(x))
    for index, block in enumerate(model.blocks):
        whole = bias_of(model, index)
        first = model.num_prefix_tokens
        bias = torch.zeros(whole.shape[0], len(x), len(x))
        # a token without a place: the mean over the places of all patches
        places = [torch.tensor([p]) if p >= 0 else torch.arange(first, whole.shape[1]) for p in at.tolist()]
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                bias[:, i, j] = whole[:, row][:, :, column].mean((1, 2))
        before, behind, mlp = halves(block)
        y, _ = attended(block.attn, before(x), bias, size if weighted else torch.ones_like(size))
        x = x + behind(y)
        for step in (step for step in trace if step.block == index):
            x, size = step.map.apply(x[None])[0], step.map.pool(size[None, :, None])[0, :, 0]
            heads = step.map.heads[0]
            at = torch.where(heads < 0, -1, at[heads.clamp(min=0)])
        x = x + mlp(x)
    return model.norm(x)


@rows
@pytest.mark.parametrize("method", ["tome", "topk", "evit", "uniform"])
@torch.no_grad()
def test_rows_and_columns_are_those_of_the_places_left(name, method):
    model = build(name)
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    for image in x:
        tokens = model.forward_tokens(image[None], trace=True)
        assert {step.block for step in tokens.trace} >= {1, 2}
        expected = by_hand(model, image[None], tokens.trace, method == "tome")
        torch.testing.assert_close(tokens.x[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_bias_is_gathered_for_every_image():
    """Prefix, patches in any order, and tokens without a place, which read means over the patches."""
    bias = torch.randn(1, 3, 10, 10)
    at = torch.tensor([[0, 5, 2, -1], [0, 9, 1, 4]])
    layout = Layout(1, True, (3, 3), track_positions=True)
    tokens = Tokens(torch.zeros(2, 4, 8), layout, positions=at)
    got = gather_places(bias, tokens)
    assert got.shape == (2, 3, 4, 4) and gather_places(bias, tokens._replace(positions=None)) is bias
    torch.testing.assert_close(got[1], bias[0][:, at[1]][:, :, at[1]])
    torch.testing.assert_close(got[0, :, :3, :3], bias[0][:, at[0, :3]][:, :, at[0, :3]])
    torch.testing.assert_close(got[0, :, 3, 1], bias[0, :, 1:, 5].mean(1))
    torch.testing.assert_close(got[0, :, 1, 3], bias[0, :, 5, 1:].mean(1))
    torch.testing.assert_close(got[0, :, 3, 3], bias[0, :, 1:, 1:].mean((1, 2)))
    torch.testing.assert_close(gather_places(bias + 7, tokens), got + 7)


@rows
@torch.no_grad()
def test_scores_see_the_bias(name, monkeypatch):
    """Rows of attention and what tokens receive are those of the biased map."""
    model, seen = build(name), []
    x = images(model)

    class Seen(Signals):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr("tokenzoo.adapters.attending.Signals", Seen)
    tokenzoo.patch_model(model, given("topk", layers=(3,)))
    model(x)
    z = model._pos_embed(model.patch_embed(x[:1]))[0]
    before, _, _ = halves(model.blocks[0])
    _, probs = attended(model.blocks[0].attn, before(z), bias_of(model, 0), torch.ones(len(z)))
    torch.testing.assert_close(seen[0].attention_received[0], probs.mean((0, 1)), atol=1e-6, rtol=1e-4)
    if model.cls_token is not None:
        torch.testing.assert_close(seen[0].class_attention[0], probs[:, 0], atol=1e-6, rtol=1e-4)


@rows
@pytest.mark.parametrize("method", ["tome", "evit", "mctf"])
def test_gradients_copies_and_number_formats(name, method):
    """The bias learns; recomputed activations, copies and pickles change nothing; bfloat16 is near."""
    model = build(name)
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters()})
    places = [key for key in grads[0] if "rel" in key]
    assert places and all(grads[0][key].abs().sum() > 0 for key in places if not key.endswith("fc2.bias"))
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-5, msg=key)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
        fewer = tokenzoo.patch_model(tokenzoo.unpatch_model(model), "uniform", keep_rate=0.6)
        exact = fewer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(fewer(x).float(), exact, atol=0.3, rtol=0.3)
        torch.testing.assert_close(fewer.bfloat16()(x.bfloat16()).float(), exact, atol=0.3, rtol=0.3)


@rows
@torch.no_grad()
def test_blocks_called_with_the_names_of_timm(name):
    """A loop of the user's own, with the shared bias under timm's name."""
    model = build(name)
    x = images(model)
    plain = [model.forward_features(x), model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]]
    tokenzoo.patch_model(model, "tome", r=2)
    z, beit = model._pos_embed(model.patch_embed(x)), name.startswith("beit")
    shared = model.rel_pos_bias if beit else model.shared_rel_pos
    given = {}
    if shared is not None:
        given = {"shared_rel_pos_bias": shared()} if beit else {"shared_rel_pos": shared.get_bias()}
    for block in model.blocks:
        z = block(z, **given)
    torch.testing.assert_close(model.norm(z), model.forward_tokens(x).x)
    tokenzoo.unpatch_model(model)
    after = [model.forward_features(x), model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]]
    assert all(torch.equal(a, b) for a, b in zip(plain, after))


@rows
@torch.no_grad()
def test_sizes_set_after_patching_are_followed(name):
    models = []
    for late in (False, True):
        model = build(name)
        if not hasattr(type(model), "set_input_size"):
            pytest.skip("the installed timm sets no sizes of this model")
        if late:
            tokenzoo.patch_model(model, "tome", r=2)
        model.set_input_size(img_size=(48, 24))
        models.append(model if late else tokenzoo.patch_model(model, "tome", r=2))
    x = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(models[0](x), models[1](x))
    assert str(tokenzoo.report(models[0])) == str(tokenzoo.report(models[1]))


@rows
def test_what_no_bias_can_serve_is_refused(name):
    model = build(name)
    kind = type(model).__name__
    with pytest.raises(ValueError, match=f"merged_positions='mean'.*{kind}.*'destination'"):
        tokenzoo.patch_model(model, "tome", r=2, merged_positions="mean")
    with pytest.raises(ValueError, match=f"protect=3.*{kind}.*leave protect out"):
        tokenzoo.patch_model(model, "tome", r=2, protect=3)


def test_a_strange_bias_is_refused():
    model = build("relpos_bias")
    model.blocks[1].attn.rel_pos.__class__ = type("Mine", (type(model.blocks[1].attn.rel_pos),), {})
    with pytest.raises(TypeError, match=r"blocks.1 attends with .*Mine"):
        tokenzoo.patch_model(model, "tome", r=2)
