"""Super token attention: held against unfold and fold, plain attention, and the rules of the association."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from svit_reference import ReferenceSViT, UnfoldFoldAttention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenzoo.layers import SuperTokenAttention
from tokenzoo.models import SViT
from tokenzoo.ops.cells.super_tokens import associate, from_cells, gather_around, gather_back, to_cells

GRIDS = [((8, 8), (4, 4)), ((14, 14), (4, 4)), ((15, 20), (4, 3)), ((7, 5), (2, 5)), ((3, 3), (3, 3)), ((9, 2), (1, 2))]
grids = pytest.mark.parametrize("size,cell", GRIDS)


def pair(cell, **options):
    """The layer and its slow reference with the same weights."""
    torch.manual_seed(0)
    layer = SuperTokenAttention(12, cell, 3, **options)
    reference = UnfoldFoldAttention(12, cell, 3, **options)
    reference.load_state_dict(layer.state_dict())
    return layer, reference


# ---- against the references


@grids
@pytest.mark.parametrize("n_iter", [1, 2, 3])
def test_equals_unfold_and_fold(size, cell, n_iter):
    layer, reference = pair(cell, n_iter=n_iter, qkv_bias=n_iter != 2)
    x = torch.randn(2, 12, *size, requires_grad=True)
    out, expected = layer(x), reference(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    given = torch.randn_like(out)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    for found, model in ((out, layer), (expected, reference)):
        found.backward(given)
        model.found = [x.grad.clone(), *(model.get_parameter(name).grad for name in names)]
        x.grad = None
    for name, ours, theirs in zip(["input", *names], layer.found, reference.found):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("size", [(14, 14), (15, 20)])
def test_cells_of_one_token_are_timms_attention(size, n_iter):
    torch.manual_seed(0)
    plain = timm.layers.Attention(16, 4, qkv_bias=True)
    layer = SuperTokenAttention(16, (1, 1), 4, n_iter)
    weights = {
        f"stoken_refine.{name}": value[(...,) + (None, None) * (value.dim() - 1)]
        for name, value in plain.state_dict().items()
    }
    for kind in ("weight", "bias"):  # timm's rows are ordered ({q, k, v}, head, channel)
        rows = weights[f"stoken_refine.qkv.{kind}"]
        weights[f"stoken_refine.qkv.{kind}"] = rows.unflatten(0, (3, 4, 4)).transpose(0, 1).flatten(0, 2)
    layer.load_state_dict(weights)
    x = torch.randn(2, 16, *size)
    expected = plain(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


# ---- the association


@grids
def test_cells_go_there_and_back(size, cell):
    x = torch.randn(2, *size, 5)
    cells = to_cells(x, cell)
    assert torch.equal(from_cells(cells, size, cell), x)
    assert cells[0, 0, -1, 0].equal(x[0, 0, (cells.shape[2] - 1) * cell[1]])


def test_gathering_back_is_the_transpose():
    supers, sent = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 4, 3, 9, 5).double()
    torch.testing.assert_close((gather_around(supers) * sent).sum(), (supers * gather_back(sent)).sum())


@grids
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("mask_borders", [False, True])
def test_shares(size, cell, n_iter, mask_borders):
    cells = to_cells(torch.randn(2, *size, 6), cell)
    found = associate(cells, n_iter, mask_borders)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(cells.shape[:4]))
    real = gather_around(torch.ones(1, *cells.shape[1:3], 1))[..., 0].unsqueeze(3)  # 1 where a neighbour exists
    lost = (found.weights * (1 - real)).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found.mass.sum(dim=(1, 2, 3)) + lost, torch.full((2,), float(cells[0, ..., 0].numel())))
    if mask_borders or n_iter == 0:
        assert not lost.any()
    else:
        assert (lost > 0).all()


@pytest.mark.parametrize("mask_borders", [False, True])
def test_constant_maps(mask_borders):
    """Inside a constant stays; at the border it keeps the share of the neighbours that exist."""
    layer = SuperTokenAttention(4, (2, 2), 1, refine=False, mask_borders=mask_borders)
    out = layer(torch.full((1, 4, 8, 8), 0.3))
    torch.testing.assert_close(out[:, :, 2:6, 2:6], torch.full((1, 4, 4, 4), 0.3))
    weights = layer.associate(torch.full((1, 4, 8, 8), 0.3)).weights
    inside = (weights * gather_around(torch.ones(1, 4, 4, 1))[..., 0].unsqueeze(3)).sum(-1, keepdim=True)
    expected = 0.3 * from_cells(inside, (8, 8), (2, 2))[..., 0]
    torch.testing.assert_close(out, expected.unsqueeze(1).expand_as(out))
    assert mask_borders == bool(torch.allclose(out, torch.full_like(out, 0.3)))


def test_order_inside_a_cell_does_not_matter():
    layer, _ = pair((2, 3))
    cells = to_cells(torch.randn(2, 6, 9, 12), (2, 3))
    order = torch.randperm(6)
    before = layer(from_cells(cells, (6, 9), (2, 3)).permute(0, 3, 1, 2))
    after = layer(from_cells(cells[:, :, :, order], (6, 9), (2, 3)).permute(0, 3, 1, 2))
    moved = to_cells(before.permute(0, 2, 3, 1), (2, 3))[:, :, :, order]
    torch.testing.assert_close(to_cells(after.permute(0, 2, 3, 1), (2, 3)), moved, atol=1e-6, rtol=1e-5)


def test_whole_cells_shift_along():
    layer = SuperTokenAttention(6, (2, 2), 1, refine=False)
    x = torch.randn(1, 6, 24, 24)
    out, shifted = layer(x), layer(x.roll((2, 4), dims=(2, 3)))
    # outputs read three cells in each direction, which may not reach the edge
    torch.testing.assert_close(shifted.roll((-2, -4), dims=(2, 3))[:, :, 6:16, 6:14], out[:, :, 6:16, 6:14])


def test_no_rounds_are_averages_of_cells():
    layer = SuperTokenAttention(6, (2, 2), 1, n_iter=0, refine=False)
    x = torch.randn(1, 6, 4, 8)
    expected = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
    torch.testing.assert_close(layer(x), expected)


def test_association_has_no_gradient():
    layer, _ = pair((2, 2))
    x = torch.randn(1, 12, 6, 6, requires_grad=True)
    found = layer.associate(x)
    assert not found.weights.requires_grad and not found.mass.requires_grad
    assert layer.super_tokens(x).requires_grad


def test_weights_are_float32_under_autocast_and_in_half_precision():
    layer, _ = pair((2, 2))
    x = torch.randn(1, 12, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.associate(x).weights.dtype == torch.float32
        torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.02)
    half = layer.bfloat16()
    assert half.associate(x.bfloat16()).weights.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, atol=0.02, rtol=0.02)


# ---- weights and refusals


def test_constant_kernels_load_both_ways():
    layer, reference = pair((2, 2))
    assert set(layer.state_dict()) == set(reference.state_dict())
    without = {name: value for name, value in layer.state_dict().items() if "fold" not in name}
    assert len(without) == 4
    layer.load_state_dict(without)
    wrong = {**layer.state_dict(), "fold.weights": torch.zeros(9, 1, 3, 3)}
    with pytest.raises(RuntimeError, match="fold.weights are not the nine shifts"):
        layer.load_state_dict(wrong)
    assert not any(p.requires_grad for name, p in layer.named_parameters() if "fold" in name)


def test_refusals():
    with pytest.raises(ValueError, match=r"cell of \(4, 4\) tokens is larger than the map of \(3, 9\)"):
        SuperTokenAttention(8, (4, 4), 2)(torch.randn(1, 8, 3, 9))
    with pytest.raises(ValueError, match="5 heads do not divide 8 channels"):
        SuperTokenAttention(8, (4, 4), 5)
    with pytest.raises(ValueError, match=r"stoken_size=\(0, 4\)"):
        SuperTokenAttention(8, (0, 4), 2)
    with pytest.raises(ValueError, match="n_iter=-1"):
        SuperTokenAttention(8, (4, 4), 2, n_iter=-1)


# ---- the backbone


def test_backbone_equals_the_reference():
    torch.manual_seed(0)
    sizes = dict(
        embed_dim=(8, 12, 16, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), stoken_size=(4, 2, 1, 1),
        layerscale=(False, False, True, True), projection=24, num_classes=7,
    )  # fmt: skip
    model, reference = SViT(**sizes, init_values=0.3), ReferenceSViT(**sizes)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 75, 64)
    for train in (True, False):  # in training, BatchNorm's statistics move
        out, expected = model.train(train)(x), reference.train(train)(x)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # images one by one in the MLPs
        torch.testing.assert_close(model(x), out, atol=1e-6, rtol=1e-5)


class Sizes(TorchDispatchMode):
    """Notes how many numbers the results of operations hold."""

    def __init__(self):
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers += [part.numel() for part in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(part)]
        return out


@pytest.mark.parametrize("train", [False, True])
def test_memory_is_linear(train):
    """Four times the tokens: four times the numbers, and never more at once than a few copies of the map."""
    layer = SuperTokenAttention(16, (4, 4), 1)
    totals = []
    for side in (32, 64):
        x = torch.randn(1, 16, side, side, requires_grad=train)
        with torch.set_grad_enabled(train), Sizes() as sizes:
            layer(x)
        assert max(sizes.numbers) <= 3 * x.numel()
        totals.append(sum(sizes.numbers))
    assert totals[1] < 4.01 * totals[0]


SPEED = """
import statistics, sys, time
sys.path.insert(0, {here!r})
import timm, torch, tokenzoo.models
from svit_reference import ReferenceSViT

torch.set_num_threads(1)
torch.manual_seed(0)
model, reference = timm.create_model("svit_small").eval(), ReferenceSViT().eval()
reference.load_state_dict(model.state_dict())
x, spent = torch.randn(8, 3, 224, 224), []
with torch.inference_mode():
    torch.testing.assert_close(model(x), reference(x), atol=1e-4, rtol=1e-4)
    for _ in range(7):
        pair = []
        for each in (model, reference):
            start = time.process_time()
            each(x)
            pair.append(time.process_time() - start)
        spent.append(pair)
print(statistics.median(theirs / ours for ours, theirs in spent))
"""


@pytest.mark.slow
def test_speed():
    """At least 1.2 times as fast as unfold and fold in NCHW (224, batch 8, one thread).

    In an interpreter of its own: what earlier tests left of the heap changes how often pages are given back. Other work
    on the machine presses the ratio towards one, so that up to three measurements are taken.
    """
    code, found = SPEED.format(here=str(Path(__file__).parent)), []
    while len(found) < 3 and max(found, default=0) <= 1.2:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(float(done.stdout.split()[-1]))
    assert max(found) > 1.2, found
