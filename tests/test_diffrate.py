"""DiffRate against a loop over images written from the equations, what it must hold, and what is refused."""

import pytest
import torch
from cases import build, images

import tokenzoo
from tokenzoo.core.tokens import trace_assign
from tokenzoo.ops.matching.ranked import ranked_partners


def by_loop(model, x, prune, merge):
    """Tokens and sizes after the last block of a pre-norm ViT with class token, one image at a time."""
    out, sizes = [], []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        size, p = torch.ones(len(h), dtype=h.dtype), model.num_prefix_tokens
        for block, kept, left in zip(model.blocks, prune, merge):
            qkv = block.attn.qkv(block.norm1(h)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * block.attn.scale + size.log()).softmax(-1)
            h = h + block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            if min(kept, left) < len(h):
                ranked = [*range(p), *sorted(range(p, len(h)), key=lambda j: -probs[:, 0, j].sum())][:kept]
                groups, mass = {i: [i] for i in ranked[:left]}, size.clone()
                for i in ranked[left:]:
                    cosines = {j: float(h[i] @ h[j] / h[i].norm() / h[j].norm()) for j in ranked[p:left]}
                    best = max(cosines, key=cosines.get)
                    groups[best].append(i)
                    mass[best] += max(0, cosines[best]) * size[i]
                size = mass[ranked[:left]]
                h = torch.stack([h[members].mean(0) for members in groups.values()])
            h = h + block.ls2(block.mlp(block.norm2(h)))
        out.append(h)
        sizes.append(size[:, None])
    return torch.stack(out), torch.stack(sizes)


@pytest.mark.parametrize("backbone", ["deit", "registers"])
@pytest.mark.parametrize("prune,merge", [
    ((21, 16, 12, 10), (17, 13, 11, 9)), ((18, 15, 40, 9), (40, 40, 40, 40)), ((40, 40, 12, 40), (16, 14, 11, 8)),
])  # fmt: skip
@torch.no_grad()
def test_model_is_the_loop(backbone, prune, merge):
    """Schedules that prune and merge, that do one of both, and that do not fall."""
    model = build(backbone).double()
    x = images(model, 2).double()
    expected, sizes = by_loop(model, x, prune, merge)
    tokenzoo.patch_model(model, "diffrate", prune=prune, merge=merge)
    tokens = list(model.walk(x))[-1]
    torch.testing.assert_close(tokens.x, expected, atol=1e-5, rtol=1e-5)  # sizes are float32
    torch.testing.assert_close(tokens.size.double(), sizes, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_owners_and_sizes():
    model = build("registers")
    x, start = images(model), 5 + 16
    for options, whole in (({"prune": 0.8, "merge": None}, False), ({"prune": None, "merge": 0.8}, True)):
        with tokenzoo.patched(model, "diffrate", **options):
            tokens = model.forward_tokens(x, trace=True)
        assign = trace_assign(tokens.trace, len(x), start, x.device)
        assert torch.equal(assign[:, :5], torch.arange(5).expand(len(x), -1))
        assert (assign >= 0).all() == whole and all(step.map.drops != whole for step in tokens.trace)
        assert (tokens.sizes() >= 1).all() and (tokens.sizes().sum(1) <= start).all()
        if not whole:
            assert all(torch.equal(step.map.matrix().sum(2), torch.ones(3, step.map.n_out).double())
                       for step in tokens.trace)  # fmt: skip


def test_identical_tokens_add_their_whole_size():
    units = torch.nn.functional.normalize(torch.ones(1, 6, 4), dim=-1)
    order, partner, cosine = ranked_partners(torch.arange(6.0)[None], units, 5, 3)
    assert order.tolist() == [[5, 4, 3, 2, 1, 0]] and partner[0, 2] == -1
    torch.testing.assert_close(cosine, torch.tensor([[1.0, 1.0, 0.0]]))


def test_padding_has_no_influence():
    """An image with padding ranks, merges and drops as it does alone."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 12, generator=generator)
    units = torch.nn.functional.normalize(torch.randn(2, 12, 5, generator=generator), dim=-1)
    real = torch.arange(12) < torch.tensor([[12], [8]])
    counts = torch.tensor([[9], [6]]), torch.tensor([[6], [4]])
    order, partner, _ = ranked_partners(scores, units, 9, 6, real, *counts)
    for image, (n, kept, stays) in enumerate([(12, 9, 6), (8, 6, 4)]):
        alone = ranked_partners(scores[image : image + 1, :n], units[image : image + 1, :n], kept, stays)
        heads = alone[0][0, :stays]
        assert torch.equal(order[image, :stays], heads)
        expected = dict(zip(alone[0][0, stays:].tolist(), alone[1][0].tolist()))
        found = dict(zip(order[image, 6:].tolist(), partner[image].tolist()))
        assert {token: slot for token, slot in found.items() if token < n} == expected
        assert sorted(order[image].tolist()) == list(range(12))


def test_counts():
    """Shares are of the patches that enter; numbers above what is left do nothing."""
    model = build("registers")
    tokenzoo.patch_model(model, "diffrate", prune=(None, 0.8, 40, 12), merge=(19, 1.0, 40, 0.5))
    rows = [row for row in tokenzoo.report(model).rows if row.block is not None]
    assert [row.tokens_out for row in rows] == [19, 17, 17, 11]  # 14 patches, 12, 12, 6


@pytest.mark.parametrize("options,error,words", [
    ({"prune": 0}, ValueError, ["prune=0", "at least 2", "(0, 1]"]),
    ({"prune": 1}, ValueError, ["prune=1", "at least 2"]),
    ({"merge": 1.2}, ValueError, ["merge=1.2", "(0, 1]"]),
    ({"merge": "few"}, TypeError, ["merge='few'", "one of these per layer"]),
    ({"prune": True}, TypeError, ["prune=True"]),
    ({"prune": (17, 16)}, ValueError, ["diffrate: prune has 2 entries for 4 layers"]),
    ({"prune": (17, None, "x", 4)}, TypeError, ["'x'"]),
    ({"merge": 5}, ValueError, ["diffrate at block 0", "merge=5", "leave none of 16 patches", "5 prefix tokens"]),
    ({"mass_pool": 2}, TypeError, ["mass_pool=2", "True or False"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("registers")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "diffrate", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)
