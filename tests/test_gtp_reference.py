"""GTP against slow float64 code written from the equations, on any grid and prefix, and its properties."""

import math

import pytest
import torch
from cases import VIT, build, images, shaken
from torch import Tensor

import tokenzoo
from tokenzoo.core.mixins import Beside
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import KeepMap
from tokenzoo.ops.attention import Heads, attend, key_bias
from tokenzoo.ops.map_reading import attend_and_read, attend_sparsely, map_statistics


def graph_of(x: Tensor, grid: tuple[int, int], kind: str, count: int) -> Tensor:
    """The normalised adjacency of the patches of one image [n, n]."""
    n, wide = x.shape[0], grid[1]
    linked = torch.zeros(n, n, dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    for i in range(n):
        if kind in ("spatial", "mixed"):
            for j in range(n):
                if i != j and abs(i // wide - j // wide) <= 1 and abs(i % wide - j % wide) <= 1:
                    linked[i, j] = 1
        if kind in ("semantic", "mixed"):
            alike = sorted((j for j in range(n) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
            linked[i, alike[:count]] = 1
    degree = linked.sum(1).clamp(min=1)
    return linked / (degree[:, None] * degree[None]).sqrt()


@torch.no_grad()
def slow(
    model: torch.nn.Module, image: Tensor, kind: str, count: int, r: int, alpha: float, scales: bool, theta: float
) -> Tensor:
    """Tokens of one image after the final norm [N, C], of a plain timm ViT in float64."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x = model.norm_pre(x)[0]
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    graph = graph_of(x[prefix:], grid, kind, count)
    size = torch.ones(len(x), dtype=torch.float64)
    for block in model.blocks:
        attn, z = block.attn, block.norm1(x)
        heads = attn.num_heads
        q, k, v = attn.qkv(z).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        rows = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        rows = (rows + size.log() * scales).softmax(-1)
        if theta < 1:
            bound = rows.flatten(1).sort(dim=1).values[:, max(1, int(len(x) ** 2 * (1 - theta))) - 1]
            rows = torch.where(rows < bound[:, None, None], 0.0, rows)
        x = x + attn.proj((rows @ v).transpose(0, 1).flatten(1))
        score = rows.sum(1).amax(0)[prefix:]
        if theta == 1:  # a cut map has zeros on its diagonal, which are ties
            score = score * rows.diagonal(dim1=1, dim2=2).amax(0)[prefix:]
        score = score.tolist()
        order = sorted(range(len(score)), key=lambda i: -score[i])
        stay, going = order[: len(order) - r], order[len(order) - r :]
        weight = alpha * graph[stay][:, going]
        values, sizes = x[prefix:], size[prefix:]
        x = torch.cat([x[:prefix], values[stay] + weight @ values[going]])
        size = torch.cat([size[:prefix], sizes[stay] + weight @ sizes[going]])
        graph = graph[stay][:, stay]
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


@pytest.mark.parametrize("kind,options,scales,theta", [
    ("mixed", {"reg_tokens": 2, "no_embed_class": True}, True, 1.0), ("spatial", {}, False, 1.0),
    ("semantic", {}, True, 0.6), ("mixed", {"class_token": False, "global_pool": "avg"}, True, 0.8),
])  # fmt: skip
def test_whole_models(kind, options, scales, theta):
    torch.manual_seed(3)
    model = shaken(VIT(img_size=(32, 48), **options))
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    exact = shaken(VIT(img_size=(32, 48), **options)).double()
    exact.load_state_dict(model.state_dict())
    # without a class token one neighbour more, as released
    count = 3 + (model.cls_token is None)
    expected = [slow(exact, image.double(), kind, count, 4, 0.3, scales, theta) for image in x]
    options = {"token_scale": scales, "sparsity": theta, "selection": "MixedAttnMax" if theta == 1 else "IMGAttnMax"}
    tokenzoo.patch_model(model, "gtp", r=4, graph=kind, neighbours=3, alpha=0.3, **options)
    with torch.no_grad():
        found = model.forward_tokens(x).x
    torch.testing.assert_close(found, torch.stack(expected).float(), atol=2e-4, rtol=1e-4)


def given_heads(seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 2, 9, 4, generator=generator) for _ in range(3))
    return Heads(q, k, v, 0.5)


def test_statistics_are_those_of_the_map():
    heads, bias = given_heads(), torch.randn(3, 1, 1, 9, generator=torch.Generator().manual_seed(1))
    rows = ((heads.q.double() @ heads.k.double().transpose(2, 3)) * 0.5 + bias.double()).softmax(-1)
    out, seen = attend_and_read(heads, bias)
    torch.testing.assert_close(out, attend(heads, bias))
    for found in (seen, map_statistics(heads, bias)):
        torch.testing.assert_close(found.own, rows.diagonal(dim1=2, dim2=3).float())
        torch.testing.assert_close(found.received, rows.sum(2).float())
        torch.testing.assert_close(found.first, rows[:, :, 0].float())
    with torch.device("cpu"):
        sliced = torch.jit.trace(lambda q, k: map_statistics(Heads(q, k, None, 0.5), bias)[:3], heads[:2])(*heads[:2])
    for one, other in zip(sliced, seen):
        torch.testing.assert_close(one, other)


def test_a_sparse_map_of_an_image_is_its_own():
    """As many entries stay of each head as the share says, and padding has no part in them."""
    heads = given_heads()
    out, seen = attend_sparsely(heads, None, 0.4)
    assert (seen.rows > 0).sum((2, 3)).unique().tolist() == [81 - int(81 * 0.6) + 1]
    counts = torch.ones(3, 9, dtype=torch.bool)
    counts[1, 5:] = False
    bias = torch.zeros(3, 1, 1, 9).masked_fill(~counts[:, None, None], float("-inf"))
    padded, _ = attend_sparsely(heads, bias, 0.4, counts)
    alone, _ = attend_sparsely(Heads(*(part[1:2, :, :5] for part in heads[:3]), 0.5), None, 0.4)
    torch.testing.assert_close(padded[1:2, :5], alone)
    torch.testing.assert_close(padded[::2], out[::2])


def step_of(tokens: Tokens, **options):
    """The map of one block, with the memory of it."""
    method = tokenzoo.create_method("gtp", r=4, neighbours=3, token_scale=False, **options)
    step = tokenzoo.core.step.Step(method, 0, 4)
    heads, bias = given_tokens_heads(tokens), key_bias(None, tokens.valid if tokens.visible is None else tokens.visible)
    signals = Signals(heads, bias, tokens)
    found = method.attend(heads, bias, tokens, Beside(tokens.x, step)) if method.attends else None
    signals.seen = None if found is None else found.seen
    return method.map(tokens.remembering(method.remember(tokens, step), 0), signals, step)


def given_tokens_heads(tokens: Tokens) -> Heads:
    x = tokens.x.unsqueeze(1)
    return Heads(x, x.roll(1, 3), x, 0.3)


def test_alpha():
    x = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(5))
    tokens = Tokens(x, Layout(1, True, (3, 4)))
    kept = step_of(tokens, propagation="none")
    assert type(kept) is KeepMap and kept.n_out == 9
    plain, one, two = (step_of(tokens, alpha=alpha).apply(x) for alpha in (0, 0.1, 0.2))
    assert torch.equal(plain, kept.apply(x))
    torch.testing.assert_close(two - plain, 2 * (one - plain))
    assert torch.equal(one[:, 0], x[:, 0]) and not torch.equal(one, plain)


def test_order_does_not_matter():
    """Patches in another order, their places with them, give the same tokens."""
    x = torch.randn(1, 13, 8, generator=torch.Generator().manual_seed(6))
    mixed = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(12)])
    tokens, layout = Tokens(x, Layout(1, True, (3, 4))), Layout(1, True, (3, 4))
    other = Tokens(x[:, mixed], layout, positions=mixed[None])
    # the class token is the first, patches come in the order of their scores
    torch.testing.assert_close(step_of(tokens).apply(x), step_of(other).apply(other.x))


@pytest.mark.parametrize("options", [
    {"propagation": "mean"}, {"propagation": "none"}, {"graph": "semantic"}, {"selection": "CosSimMean"},
    {"selection": "CLSAttnMax", "sparsity": 0.5}, {"selection": "SumAttnMax"},
    {"selection": "CosSimMax", "sparsity": 0.7},
], ids=str)  # fmt: skip
def test_images_are_alone(options):
    """Every option: a batch that is padded for a longer image, and tokens that a mask hides, change nothing."""
    x, layout = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(7)), Layout(1, True, (3, 4))
    seen = torch.ones(2, 13, dtype=torch.bool)
    seen[1, 9:] = False
    alone = step_of(Tokens(x[1:, :9], layout, positions=torch.arange(9)[None]), **options)
    padded = step_of(Tokens(x, layout, valid=seen, positions=torch.arange(13).expand(2, -1)), **options)
    length = alone.n_out
    torch.testing.assert_close(padded.apply(x)[1:, :length], alone.apply(x[1:, :9]))
    assert padded.valid[1].sum() == length and not padded.apply(x)[1, length:].any()
    hidden = []
    for noise in (0.0, 9.0):
        values = x + noise * ~seen.unsqueeze(2)
        found = step_of(Tokens(values, layout, visible=seen), **options).masked(seen)
        visible = found.pool(seen.unsqueeze(2).float()) > 0
        hidden.append(torch.where(visible, found.apply(values), 0.0))
    torch.testing.assert_close(*hidden)


def test_one_patch_is_left():
    model = build("deit")
    tokenzoo.patch_model(model, "gtp", r=15, layers=(0, 1), clip=True)
    assert model.forward_tokens(images(model)).length == 2
