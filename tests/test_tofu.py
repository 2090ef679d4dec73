"""ToFu against a loop over images written from the equations, what it must hold, and what is refused."""

import pytest
import torch
from cases import build, images
from test_matching_reference import slow_tome

import tokenzoo
from tokenzoo.maps import MergeMap, MlerpMap


def by_loop(model, x, r, early, rule):
    """Tokens after every block of a pre-norm ViT, one image at a time."""
    out = []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        rows = []
        for index, block in enumerate(model.blocks):
            qkv = block.attn.qkv(block.norm1(h)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * block.attn.scale).softmax(-1)
            h = h + block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            into, order = slow_tome(k.mean(0), r[index], model.num_prefix_tokens)
            new = []
            for head in order:
                group = [head, *(src for src, dst in into.items() if dst == head)]
                value = h[head]
                if index >= early and len(group) > 1:
                    mean = h[group].mean(0)
                    by = mean if rule == "mlerp" else h[head]
                    value = mean / by.norm() * max(h[i].norm() for i in group)
                new.append(value)
            h = torch.stack(new)
            h = h + block.ls2(block.mlp(block.norm2(h)))
            rows.append(h)
        out.append(rows)
    return [torch.stack(rows) for rows in zip(*out)]


@pytest.mark.parametrize("rule", ["mlerp", "ports"])
@pytest.mark.parametrize("backbone", ["deit", "registers", "gap", "layer_scale"])
@torch.no_grad()
def test_model_is_the_loop(backbone, rule):
    model = build(backbone).double()
    x = images(model, 2).double()
    r = (3, 3, 4, 1)
    expected = by_loop(model, x, r, 2, rule)
    tokenzoo.patch_model(model, "tofu", r=r, early=2, rule=rule)
    for tokens, rows in zip(list(model.walk(x))[1:], expected):
        torch.testing.assert_close(tokens.x, rows, atol=1e-9, rtol=1e-9)


def test_half_of_the_blocks_and_one_more_drop():
    assert [dropped for _, dropped in tokenzoo.ToFu(r=1).strengths(12).values()] == [True] * 7 + [False] * 5
    assert tokenzoo.ToFu(r=(2, 0, 1), early=1).strengths(3) == {0: (2, True), 2: (1, False)}


@torch.no_grad()
def test_early_blocks_leave_tokens_as_they_were():
    model = build("deit")
    tokenzoo.patch_model(model, "tofu", r=3, early=4)
    for step in model.forward_tokens(images(model), trace=True).trace:
        assert step.map.copies and step.map.n_in - step.map.n_out == 3


def merge(x: torch.Tensor, members: list[int], **options: str) -> torch.Tensor:
    """Six tokens, some of which merge into the first."""
    order = torch.tensor([[i for i in range(6) if i not in members]])
    src = torch.tensor([members])
    return MlerpMap(order, src, torch.zeros_like(src), 6, **options).apply(x)


def test_norms_are_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 5, generator=generator, dtype=torch.float64)
    out = merge(x, [2, 4])
    mean = x[0, [0, 2, 4]].mean(0)
    assert out[0, 0].norm() == pytest.approx(float(x[0, [0, 2, 4]].norm(dim=1).max()), rel=1e-9)
    torch.testing.assert_close(out[0, 0] / out[0, 0].norm(), mean / mean.norm())
    assert torch.equal(out[0, 1:], x[0, [1, 3, 5]])
    torch.testing.assert_close(merge(x[:, :1].expand(-1, 6, -1), [2, 4]), x[:, :1].expand(-1, 4, -1))
    units = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(merge(units, [3])[0, 0], torch.nn.functional.normalize(units[0, 0] + units[0, 3], dim=0))
    ports = merge(x, [2, 4], divisor="head")
    torch.testing.assert_close(ports[0, 0], mean / x[0, 0].norm() * x[0, [0, 2, 4]].norm(dim=1).max())


def test_opposite_tokens_leave_the_one_that_heads_them():
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    opposite = torch.cat([x[:, :3], -x[:, :1], x[:, 4:]], dim=1)
    out = merge(opposite, [3])
    assert torch.equal(out[:, 0], x[:, 0])
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_hidden_members_count_for_nothing():
    """Neither in the mean nor as the longest one."""
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    order, src, slot = (torch.tensor([row] * 2) for row in ([0, 1, 2], [3, 4, 5], [1, 1, 2]))
    visible = torch.ones(2, 6, dtype=torch.bool)
    visible[:, [2, 4]] = False
    loud = torch.where(visible.unsqueeze(2), x, 100.0)
    plain = MlerpMap(order, src, slot, 6)
    out = plain.masked(visible).apply(loud)
    pair = MergeMap(order[:, :2], src[:, :1], slot[:, :1], 4).apply(x[:, :4])[:, 1]
    torch.testing.assert_close(out[:, 1] / out[:, 1].norm(dim=1, keepdim=True), pair / pair.norm(dim=1, keepdim=True))
    torch.testing.assert_close(out[:, 1].norm(dim=1), x[:, [1, 3]].norm(dim=2).amax(1))
    torch.testing.assert_close(out[:, 2], x[:, 5])
    with pytest.raises(TypeError, match="no matrix"):
        plain.matrix()


@pytest.mark.parametrize("options,error,words", [
    ({"early": -1}, ValueError, ["early=-1", "negative", "None"]),
    ({"early": 0.5}, TypeError, ["early=0.5", "number of blocks"]),
    ({"rule": "slerp"}, ValueError, ["rule='slerp'", "'mlerp'", "'ports'"]),
    ({"r": 9}, ValueError, ["tofu at block 0", "r=9", "at most 8", "clip=True"]),
    ({"r": "all"}, TypeError, ["'all'", "give"]),
    ({"clip": 1}, TypeError, ["clip=1", "True or False"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "tofu", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)
