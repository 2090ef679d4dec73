"""Turbo against a loop over images written from the equations, its end at ToMe, and what is refused."""

import pytest
import torch
from cases import build, images
from test_matching_reference import cosine

import tokenzoo


def by_loop(model, x, r, weights):
    """Tokens and sizes after the last block of a pre-norm ViT with class token, one image at a time."""
    out, sizes = [], []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        size, p = torch.ones(len(h), dtype=h.dtype), model.num_prefix_tokens
        for block, count, weight in zip(model.blocks, r, weights):
            qkv = block.attn.qkv(block.norm1(h)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * block.attn.scale + size.log()).softmax(-1)
            h = h + block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            metric, seen = k.mean(0), probs[:, 0].mean(0)
            even, odd = ([i for i in range(start, len(h), 2) if i >= p] for start in (0, 1))
            if count == 0:  # tokens keep their places
                even, odd = [], range(p, len(h))
            best = {i: max(odd, key=lambda j: cosine(metric[i], metric[j])) for i in even}
            score = {i: cosine(metric[i], metric[j]) - weight * float(seen[i]) for i, j in best.items()}
            gone = sorted(even, key=lambda i: -score[i])[:count]
            heads = [*range(p), *(i for i in even if i not in gone), *odd]
            groups = [[head, *(i for i in gone if best[i] == head)] for head in heads]
            h = torch.stack([(h[g] * size[g, None]).sum(0) / size[g].sum() for g in groups])
            size = torch.stack([size[g].sum() for g in groups])
            h = h + block.ls2(block.mlp(block.norm2(h)))
        out.append(h)
        sizes.append(size[:, None])
    return torch.stack(out), torch.stack(sizes)


@pytest.mark.parametrize("backbone", ["deit", "registers"])
@torch.no_grad()
def test_model_is_the_loop(backbone):
    """The penalty changes over the blocks that merge, those with r = 0 not counted."""
    model = build(backbone).double()
    x = images(model, 2).double()
    expected, sizes = by_loop(model, x, (3, 0, 4, 2), (30 * 2 * 0.25, 0, 30 * 2 * 0.5, 30 * 2))
    tokenzoo.patch_model(model, "turbo", r=(3, 0, 4, 2), alpha=2, beta=0.5, gamma=2, min_tokens=0)
    tokens = list(model.walk(x))[-1]
    torch.testing.assert_close(tokens.x, expected, atol=1e-5, rtol=1e-5)  # sizes are float32
    torch.testing.assert_close(tokens.size.double(), sizes)


@pytest.mark.parametrize("backbone", ["deit", "gap"])
@torch.no_grad()
def test_without_penalty_it_is_tome(backbone):
    model = build(backbone)
    x = images(model)
    with tokenzoo.patched(model, "tome", r=3):
        expected = model(x)
    with tokenzoo.patched(model, "turbo", r=3, alpha=0, min_tokens=0):
        assert torch.equal(model(x), expected)
    with tokenzoo.patched(model, "turbo", r=3, min_tokens=0):
        assert not torch.allclose(model(x), expected, atol=1e-5)


def test_few_tokens_are_left_alone():
    model = build("deit")
    tokenzoo.patch_model(model, "turbo", r=3, min_tokens=14)
    rows = [row for row in tokenzoo.report(model).rows if row.block is not None]
    assert [row.tokens_out for row in rows] == [14, 11, 11, 11]
    assert model.forward_tokens(images(model)).length == 11


@pytest.mark.parametrize("options,error,words", [
    ({"alpha": -1}, ValueError, ["alpha=-1", "negative", "0 is ToMe"]),
    ({"beta": 0}, ValueError, ["beta=0", "positive"]),
    ({"gamma": "last"}, TypeError, ["gamma='last'", "number of a block"]),
    ({"min_tokens": 4.5}, TypeError, ["min_tokens=4.5", "however few"]),
    ({"r": 9, "min_tokens": 0}, ValueError, ["turbo at block 0", "r=9", "at most 8", "clip=True"]),
    ({"prop_attn": None}, TypeError, ["prop_attn=None", "True or False"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "turbo", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)


def test_a_limit_of_tokens_and_padding_are_refused():
    model = build("deit")
    with pytest.raises(ValueError, match="turbo: min_tokens=40 .* but ats leaves .* set min_tokens=0"):
        tokenzoo.patch_model(model, [{"method": "ats", "layers": (0,)}, {"method": "turbo", "r": 1}])
    tokenzoo.patch_model(model, [{"method": "ats", "layers": (0,)}, {"method": "turbo", "r": 1, "min_tokens": 0}])
    assert model(images(model)).isfinite().all()
