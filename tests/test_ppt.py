"""PPT against loops written from the equations, its two ends, and what is refused."""

import pytest
import torch
from cases import build, images
from test_matching_reference import slow_tome

import tokenzoo
from tokenzoo.methods.ppt import shares_and_variance


def by_loop(model, x, r, layers, threshold):
    """Tokens, sizes and decisions of a pre-norm ViT with class token, one image at a time, from the equations."""
    out, sizes, merged = [], [], []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        size, p = torch.ones(len(h), dtype=h.dtype), model.num_prefix_tokens
        for index, block in enumerate(model.blocks):
            qkv = block.attn.qkv(block.norm1(h)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * block.attn.scale + size.log()).softmax(-1)
            h = h + block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            if index in layers:
                raw = [float(probs[:, 0, j].sum() * v[:, j].norm()) for j in range(p, len(h))]
                share = [value / sum(raw) for value in raw]
                mean = sum(share) / len(share)
                variance = sum((value - mean) ** 2 for value in share) / (len(share) - 1)
                merged.append(variance < threshold)
                if merged[-1]:
                    into, order = slow_tome(k.mean(0), r, p)
                else:
                    into, order = {}, [*range(p), *sorted(range(p, len(h)), key=lambda j: -raw[j - p])[: len(raw) - r]]
                groups = [[head, *(src for src, dst in into.items() if dst == head)] for head in order]
                h = torch.stack([(h[g] * size[g, None]).sum(0) / size[g].sum() for g in groups])
                size = torch.stack([size[g].sum() for g in groups])
            h = h + block.ls2(block.mlp(block.norm2(h)))
        out.append(h)
        sizes.append(size[:, None])
    return torch.stack(out), torch.stack(sizes), merged


@pytest.mark.parametrize("backbone", ["deit", "registers", "layer_scale"])
@torch.no_grad()
def test_model_is_the_loop(backbone):
    model = build(backbone).double()
    x = images(model, 4).double()
    expected, sizes, merged = by_loop(model, x, 3, (1, 3), 7e-3)
    assert len(set(merged)) == 2  # some images merge, some are pruned
    tokenzoo.patch_model(model, "ppt", r=3, layers=(1, 3), threshold=7e-3)
    tokens = list(model.walk(x))[-1]
    torch.testing.assert_close(tokens.x, expected, atol=1e-5, rtol=1e-5)  # sizes are float32
    torch.testing.assert_close(tokens.size.double(), sizes)


@torch.no_grad()
def test_the_two_ends():
    """Never pruning is ToMe in these blocks; always pruning leaves tokens as they were, the most significant ones."""
    model = build("registers")
    x = images(model)
    with tokenzoo.patched(model, "tome", r=4, layers=(1, 2)):
        tome = model.forward_tokens(x)
    with tokenzoo.patched(model, "ppt", r=4, layers=(1, 2), threshold=float("inf")):
        merged = model.forward_tokens(x)
    assert torch.equal(merged.x, tome.x) and torch.equal(merged.size, tome.size)
    with tokenzoo.patched(model, "ppt", r=4, layers=(1, 2), threshold=0):
        pruned = model.forward_tokens(x, trace=True)
    for step in pruned.trace:
        rows = step.map.matrix()
        assert ((rows == 1).sum(2) == 1).all() and (rows.sum(2) == 1).all()
    assert (pruned.size == 1).all() and pruned.trace[0].map.drops


def test_shares():
    """They add up to one; equal ones do not vary, one alone varies by about 1 / n; what is hidden has no part."""
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    share, variance = shares_and_variance(scores)
    torch.testing.assert_close(share.sum(1), torch.ones(3))
    torch.testing.assert_close(variance[:, 0], share.var(1))
    assert shares_and_variance(torch.ones(1, 8))[1].item() == 0
    assert shares_and_variance(torch.eye(8)[:1])[1].item() == pytest.approx(1 / 8)
    counted = torch.arange(8) < torch.tensor([[8], [5], [1]])
    part, own = shares_and_variance(scores, counted)
    assert (part[~counted] == 0).all() and own[2] == 0
    torch.testing.assert_close(own[1], shares_and_variance(scores[1:2, :5])[1][0])


@torch.no_grad()
def test_significance_without_a_class_token():
    """The mean attention that a patch receives stands in for that of the class token."""
    model, outs = build("gap"), []
    x = images(model)
    for threshold in (0, 2e-3, float("inf")):
        with tokenzoo.patched(model, "ppt", r=3, threshold=threshold):
            outs.append(model(x))
    assert not any(torch.allclose(a, b, atol=1e-5) for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("options,error,words", [
    ({"threshold": -1e-5}, ValueError, ["threshold=-1e-05", "negative", "0 always prunes"]),
    ({"threshold": "low"}, TypeError, ["threshold='low'"]),
    ({"r": 9}, ValueError, ["ppt at block 1", "r=9", "at most 8", "clip=True"]),
    ({"r": -1}, ValueError, ["r=-1", "negative"]),
    ({"r": 0.5}, TypeError, ["r=0.5", "give an int"]),
    ({"prop_attn": "on"}, TypeError, ["prop_attn='on'", "True or False"]),
    ({"layers": (1, 4)}, ValueError, ["ppt", "block 4", "0 to 3"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "ppt", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)
