"""Slow-fast updates against a loop over images, what they keep, and what is refused."""

import pytest
import torch
from cases import build, images

import tokenzoo


def by_loop(model, x, rates, blend):
    """Patch values after every block of a pre-norm ViT, one image at a time, from the equations."""
    out = []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        p, scores, rows = model.num_prefix_tokens, None, []
        for block, rate in zip(model.blocks, rates):
            count = len(h) - p
            slow = int(count * rate)
            if slow < count:
                order = sorted(range(count), key=lambda i: -scores[i].item())
                info, fast = sorted(order[:slow]), sorted(order[slow:])
                weights = scores[fast] / scores[fast].sum()
                rep = (weights[:, None] * h[p:][fast]).sum(0, keepdim=True)
                z = torch.cat([h[:p], h[p:][info], rep])
            else:
                info, fast, z = list(range(count)), [], h
            qkv = block.attn.qkv(block.norm1(z)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * block.attn.scale).softmax(-1)
            seen = probs[:, 0].mean(0) if model.cls_token is not None else probs.mean((0, 1))
            a = block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            f = block.ls2(block.mlp(block.norm2(z + a)))
            new = h.clone()
            new[:p] = (z + a + f)[:p]
            new[p:][info] = (z + a + f)[p : p + len(info)]
            if fast:
                new[p:][fast] = h[p:][fast] + (a + f)[-1]
            mine = seen[p : p + len(info)]
            if scores is None:
                scores = mine
            else:
                scores = scores.clone()
                scores[info] = (1 - blend) * scores[info] + blend * mine
            h = new
            rows.append(h)
        out.append(torch.stack(rows))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("backbone", ["deit", "registers", "gap", "layer_scale"])
@torch.no_grad()
def test_model_is_the_loop(backbone, blend):
    model = build(backbone).double()
    x = images(model, 2).double()
    expected = by_loop(model, x, (1, 0.5, 0.3, 0.8), blend)
    tokenzoo.patch_model(model, "evo", layers=(1, 2, 3), keep_rate=(0.5, 0.3, 0.8), blend=blend)
    for tokens, rows in zip(list(model.walk(x))[1:], expected):
        torch.testing.assert_close(tokens.x, rows, atol=1e-5, rtol=1e-5)  # importance is float32


@torch.no_grad()
def test_fast_tokens_gain_the_same_and_keep_their_importance():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, "evo", layers=(2,), keep_rate=0.25)
    states = list(model.walk(x, trace=True))
    before, after, (note,) = states[2], states[3], states[3].inside
    fast = note.map.dropped
    assert fast.sum(1).tolist() == [12, 12, 12] and not fast[:, 0].any()
    gain = after.x - before.x
    for image, own in zip(gain, fast):
        torch.testing.assert_close(image[own], image[own][:1].expand(12, -1), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(image[~own], image[own][0], atol=1e-3)
    assert torch.equal(after.scores[fast], before.scores[fast])


def test_gradients_reach_fast_tokens():
    model = build("deit")
    tokenzoo.patch_model(model, "evo", layers=(1,), keep_rate=0.25)
    tokens = next(iter(model.walk(images(model), last=0)))
    leaf = tokens._replace(x=tokens.x.detach().requires_grad_())
    scored = model.blocks[0](leaf)
    out = model.blocks[1](scored)
    out.x[:, 0].sum().backward()  # the class token alone sees the others through their representative
    assert (leaf.x.grad.abs().sum(-1) > 0).all()


def test_rates_can_change_during_training():
    model = build("deit")
    tokenzoo.patch_model(model, "evo")
    assert {row.name for row in tokenzoo.report(model).rows if row.methods} == {f"blocks.{i}" for i in range(4)}
    more = tokenzoo.report(model).total
    tokenzoo.update_method(model, keep_rate=0.25)
    assert tokenzoo.report(model).total < more and model(images(model)).isfinite().all()


@pytest.mark.parametrize("options,error,words", [
    ({"layers": (0, 1)}, ValueError, ["block 0", "no importance"]),
    ({"keep_rate": 0}, ValueError, ["keep_rate=0", "(0, 1]"]),
    ({"keep_rate": "half"}, TypeError, ["keep_rate='half'"]),
    ({"keep_rate": (0.5, 0.5)}, ValueError, ["2 entries for 3 layers"]),
    ({"keep_rate": 0.05}, ValueError, ["evo at block 1", "none of 16", "raise it"]),
    ({"blend": 0}, ValueError, ["blend=0", "forgets"]),
    ({"blend": None}, TypeError, ["blend=None"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "evo", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)
