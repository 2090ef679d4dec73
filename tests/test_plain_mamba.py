"""PlainMamba: figures of the card, paths, pruned grids against a slow reference, image sizes, checkpoints, refusals."""

import copy
import pickle
import threading

import plain_mamba_reference as reference
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from tokenzoo.models import PlainMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.plain_mamba import orders as orders
from tokenzoo.models.plain_mamba.checkpoint import fit_weights, load_official, official_names
from tokenzoo.models.plain_mamba.costs import block_macs, macs, scan_macs
from tokenzoo.models.plain_mamba.mixer import PlainMambaMixer
from tokenzoo.models.plain_mamba.model import PlainMambaBlock
from tokenzoo.models.plain_mamba.orders import build_paths, kept_paths, scan_paths

# name -> parameters in millions without and with classifier, GMACs at 224 with four scans
PUBLISHED = {
    "plain_mamba_l1": (7.36, 7.55, 3.01), "plain_mamba_l2": (25.76, 26.15, 8.07),
    "plain_mamba_l3": (50.51, 50.96, 14.43),
}  # fmt: skip
GRIDS = [(high, wide) for high in range(1, 7) for wide in range(1, 7)]
CPU = torch.device("cpu")


def build(seed=0, **options):
    """A tiny model in evaluation mode, nothing at its start value."""
    torch.manual_seed(seed)
    tiny = {
        "img_size": 48, "patch_size": 8, "embed_dim": 16, "depth": 3, "d_state": 4, "conv_size": 3, "num_classes": 7,
        "depthwise_layers": (0,),
    }  # fmt: skip
    return shake(PlainMamba(**{**tiny, **options})).eval()


def mixer(**options):
    torch.manual_seed(0)
    layer = shake(PlainMambaMixer(**{"dim": 12, "d_state": 3, "conv_size": 3, **options}))
    with torch.no_grad():
        layer.dt_proj.bias.add_(2)  # large steps, so that decay matters
    return layer


def shake(module):
    """Moves parameters and statistics away from where they start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = 0.2 * torch.randn(value.shape, generator=generator)
                value += noise.abs() if "running_var" in name else noise
    return module


def image(batch=2, size=(48, 48), seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def choose(batch, length, count, seed=0):
    """Ascending positions [B, count]."""
    rows = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :count]
    return rows.sort(1).values


def randn(*shape, seed=3, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


# ---- the card's figures


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    backbone, whole, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == whole
    assert round((count - sum(p.numel() for p in model.head.parameters())) / 1e6, 2) == backbone
    assert round(macs(model, (14, 14)) / 1e9, 2) == gmacs
    assert not model.pretrained_cfg["url"] and model.pretrained_cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
def test_formula_counts_the_layers_that_run(grid):
    """All but the scans, counted from the shapes that occur."""
    model, total = build(depthwise_layers=(0, 2)), 0

    def count(module, args, out):
        nonlocal total
        total += module.weight.numel() * (out[0, 0].numel() if out.dim() == 4 else out[..., 0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(image(1, (8 * grid[0], 8 * grid[1])))
    length = grid[0] * grid[1]
    scan = scan_macs(32, 4, length)
    assert scan == length * 32 * 37
    assert macs(model, grid) == macs(model, length) == total + 3 * 4 * scan
    assert macs(model, grid, directions=1) == total + 3 * scan


def test_formula_of_fewer_tokens():
    """Convolutions run on the whole grid, all else on the tokens that are left."""
    model = build()
    dense, fewer = macs(model, 36), macs(model, 36, kept=[36, 20, 20])
    per_token = block_macs(model.layers[1], 36) / 36
    conv = model.layers[1].mamba.conv2d.weight.numel()
    assert dense - fewer == 2 * 16 * (per_token - conv)
    assert macs(model, 36, kept=[36] * 3) == dense
    with pytest.raises(ValueError, match="directions=2"):
        macs(model, 36, directions=2)
    with pytest.raises(ValueError, match="2 token counts for 3 blocks"):
        macs(model, 36, kept=[36, 20])
    with pytest.raises(ValueError, match="37 tokens cannot be left of a grid of 36"):
        macs(model, 36, kept=[37, 36, 36])


# ---- paths


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_paths(grid):
    paths, length = build_paths(grid), grid[0] * grid[1]
    for path in range(4):
        order, code = paths.order[path].tolist(), paths.direction[path].tolist()
        assert sorted(order) == list(range(length))
        assert order == reference.filtered_path(grid, path, list(range(length)))
        assert paths.inverse[path][paths.order[path]].tolist() == list(range(length))
        arrive = reference.arrivals(grid, path)  # fails where a step is not to a neighbour
        assert code == [arrive[position] for position in order]


@pytest.mark.parametrize("grid,count", [((5, 4), 9), ((4, 6), 1), ((3, 3), 9), ((1, 7), 3), ((6, 1), 4)])
def test_paths_of_kept_tokens(grid, count):
    kept = choose(3, grid[0] * grid[1], count)
    found = kept_paths(grid, kept)
    for image_, positions in enumerate(kept.tolist()):
        for path in range(4):
            order, inverse, code, step = (t[image_, path].tolist() for t in found)
            visited = [positions[i] for i in order]
            assert visited == reference.filtered_path(grid, path, positions)
            assert [order[i] for i in inverse] == list(range(count))
            assert code == [reference.arrivals(grid, path)[position] for position in visited]
            along = reference.filtered_path(grid, path, list(range(grid[0] * grid[1])))
            assert [along[i] for i in step] == visited and step == sorted(step)


def test_paths_are_computed_once(monkeypatch):
    monkeypatch.setattr(orders, "_cache", type(orders._cache)())
    monkeypatch.setattr(orders, "_LIMIT", 3)
    with torch.inference_mode():
        first = scan_paths((5, 7), CPU)
    assert scan_paths((5, 7), CPU) is first
    assert not any(t.is_inference() for t in first)  # training saves them for the backward pass
    for wide in range(1, 5):
        scan_paths((2, wide), CPU)
        scan_paths((5, 7), CPU)
    assert len(orders._cache) == 3 and scan_paths((5, 7), CPU) is first
    with pytest.raises(ValueError, match=r"a grid of \(0, 3\) tokens is empty"):
        scan_paths((0, 3), CPU)


def test_paths_for_many_threads(monkeypatch):
    monkeypatch.setattr(orders, "_cache", type(orders._cache)())
    monkeypatch.setattr(orders, "_LIMIT", 5)
    wrong = []

    def ask(offset):
        for i in range(200):
            grid = GRIDS[(i * 7 + offset) % len(GRIDS)]
            if not torch.equal(scan_paths(grid, CPU).order, build_paths(grid).order):
                wrong.append(grid)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(orders._cache) == 5


# ---- the mixer


def test_all_tokens_kept():
    layer, y = mixer(), randn(2, 20, 12)
    kept = torch.arange(20).expand(2, -1)
    expected = layer(y, (5, 4))
    torch.testing.assert_close(layer(y, (5, 4), kept), expected, atol=1e-6, rtol=1e-5)
    slow, _ = reference.mix(layer, y, (5, 4), kept)
    torch.testing.assert_close(expected.double(), slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid,count,size", [((5, 4), 11, 3), ((4, 5), 19, 7), ((1, 9), 4, 3), ((6, 3), 1, 5)])
def test_kept_tokens_against_the_slow_reference(grid, count, size):
    layer = mixer(conv_size=size)
    kept = choose(2, grid[0] * grid[1], count)
    y, signals = randn(2, count, 12), ScanSignals()
    slow, scores = reference.mix(layer, y, grid, kept)
    torch.testing.assert_close(layer(y, grid, kept).double(), slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(y, grid, kept, signals=signals).double(), slow, atol=1e-5, rtol=1e-5)
    found = torch.stack([out.clamp(min=0).sum(1) for out in signals.y], dim=1)
    torch.testing.assert_close(found.double(), scores, atol=1e-4, rtol=1e-4)


def test_stretch():
    """Every path decays by what it is told; the input is weighted by the step size as ever."""
    layer, grid, kept = mixer(), (5, 4), choose(2, 20, 12)
    y, seen = randn(2, 12, 12), []

    def longer(dt, path, of_zero):
        seen.append(path)
        expected = F.softplus(2 * layer.dt_proj.bias)
        torch.testing.assert_close(of_zero, expected)
        assert dt.shape == (2, 24, 12)
        return dt * (1.5 + path) + torch.arange(12) * of_zero[:, None]

    of_zero = F.softplus(2 * layer.dt_proj.bias.detach().double())
    slow, _ = reference.mix(
        layer, y, grid, kept, lambda dt, path: dt * (1.5 + path) + torch.arange(12)[:, None] * of_zero
    )
    plain = layer(y, grid, kept)
    stretched = layer(y, grid, kept, stretch=longer)
    assert seen == [0, 1, 2, 3]
    torch.testing.assert_close(stretched.double(), slow, atol=1e-5, rtol=1e-5)
    assert (stretched - plain).abs().max() > 1e-3
    same = layer(y, grid, kept, stretch=lambda dt, path, of_zero: dt)
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=1e-5)


def test_decay_over_gaps_is_the_full_scan_with_silent_tokens():
    """Kept tokens alone, decaying over the gaps in closed form, equal the whole path without input in the gaps."""
    layer, grid, kept = mixer(), (4, 4), choose(1, 16, 7)
    paths = kept_paths(grid, kept)
    y = randn(1, 7, 12)
    gaps = paths.step.diff(dim=2, prepend=paths.step[:, :, :1] - 1) - 1  # pruned tokens before each kept one

    def hold(dt, path, of_zero):
        before = torch.cat([dt[:, :, :1], dt[:, :, :-1]], dim=2)
        return dt + gaps[:, path].unsqueeze(1) * before

    signals = ScanSignals()
    layer(y, grid, kept, stretch=hold, signals=signals)
    x = F.silu(conv_of_kept(layer, y, grid, kept)).double()[0]
    a = -layer.A_log.double().exp()
    for path in range(4):
        dt, b, c = (t[path][0].double() for t in (signals.delta, signals.B, signals.C))
        h, last, step, found = torch.zeros(24, 3, dtype=torch.float64), None, 0, {}
        where = paths.step[0, path].tolist()
        for t in range(where[-1] + 1):
            if t in where:
                last = dt[:, step]
                token = paths.order[0, path, step]
                h = (last[:, None] * a).exp() * h + last[:, None] * b[:, step] * x[token][:, None]
                found[int(token)] = h @ c[:, step] + layer.D.double() * x[token]
                step += 1
            elif last is not None:
                h = (last[:, None] * a).exp() * h
        expected = torch.stack([found[i] for i in range(7)], dim=1)
        torch.testing.assert_close(signals.y[path][0].double(), expected, atol=1e-5, rtol=1e-5)


def conv_of_kept(layer, y, grid, kept):
    x = layer.in_proj(y)[..., : layer.d_inner]
    maps = torch.zeros(len(y), grid[0] * grid[1], layer.d_inner)
    maps[torch.arange(len(y))[:, None], kept] = x
    out = layer.conv2d(maps.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    return out[torch.arange(len(y))[:, None], kept]


def test_signals():
    layer, y, signals = mixer(), randn(2, 20, 12), ScanSignals()
    out = layer(y, (5, 4), signals=signals)
    torch.testing.assert_close(out, layer(y, (5, 4)), atol=1e-6, rtol=1e-5)
    for field in ("delta", "raw_delta", "B", "C", "y"):
        rows = 3 if field in "BC" else 24
        assert [t.shape for t in getattr(signals, field)] == [(2, rows, 20)] * 4, field
    bias = layer.dt_proj.bias[:, None]
    torch.testing.assert_close(F.softplus(signals.raw_delta[0] + 2 * bias), signals.delta[3])
    gated = (sum(signals.y) * signals.gate).transpose(1, 2)
    torch.testing.assert_close(layer.out_proj(gated), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(signals.gate, F.silu(layer.in_proj(y)[..., 24:]).transpose(1, 2))
    assert not torch.equal(signals.B[0], signals.B[2])
    with torch.no_grad():
        layer.direction_Bs.zero_()
        layer(y, (5, 4), signals=signals)
    assert all(torch.equal(b, signals.B[0]) for b in signals.B[1:])


def test_images_of_a_batch_are_independent():
    layer, y, kept = mixer(), randn(3, 12, 12), choose(3, 20, 12)
    out = layer(y, (5, 4), kept)
    assert torch.equal(out, layer(y, (5, 4), kept))
    for i in range(3):
        torch.testing.assert_close(layer(y[i : i + 1], (5, 4), kept[i : i + 1]), out[i : i + 1], atol=1e-6, rtol=1e-5)


def test_gradients_of_the_mixer():
    layer = mixer(dim=3, d_state=2).double()
    y = randn(1, 5, 3, dtype=torch.float64).requires_grad_()
    kept = choose(1, 9, 5)
    names = [name for name, _ in layer.named_parameters()]

    def run(y, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (y, (3, 3), kept))

    values = tuple(p.detach().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradcheck(run, (y, *values), atol=1e-5, rtol=1e-3)


def test_start():
    torch.manual_seed(0)
    layer = PlainMambaMixer(192)
    layer.requires_grad_(False)
    assert layer.dt_rank == 12 and PlainMambaMixer(20).dt_rank == 2
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(384, -1))
    dt = F.softplus(layer.dt_proj.bias)
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 and 0.008 < dt.log().mean().exp() < 0.0125
    assert (layer.D == 1).all() and (layer.in_proj.bias == 0).all() and (layer.out_proj.bias == 0).all()
    for weight in (layer.in_proj.weight, layer.x_proj.weight, layer.out_proj.weight, layer.direction_Bs):
        assert weight.std() == pytest.approx(0.02, rel=0.25)
    assert layer.dt_proj.weight.abs().max() == pytest.approx(12**-0.5, rel=0.01)


def test_block():
    """Released order: residual first, then the convolution of the whole stream, without a residual."""
    torch.manual_seed(0)
    block = shake(PlainMambaBlock(12, depthwise=True, d_state=3, conv_size=3)).eval()
    x, kept = randn(2, 11, 12), choose(2, 20, 11)
    stream = x + block.mamba(block.norm(x), (5, 4), kept)
    maps = torch.zeros(2, 20, 12)
    maps[torch.arange(2)[:, None], kept] = stream
    maps = F.conv2d(maps.transpose(1, 2).unflatten(2, (5, 4)), block.dw[0].weight, padding=1, groups=12)
    expected = F.gelu(block.dw[1](maps)).flatten(2).transpose(1, 2)[torch.arange(2)[:, None], kept]
    torch.testing.assert_close(block(x, (5, 4), kept), expected, atol=1e-5, rtol=1e-5)
    whole = torch.arange(20).expand(2, -1)
    x = randn(2, 20, 12)
    torch.testing.assert_close(block(x, (5, 4), whole), block(x, (5, 4)), atol=1e-6, rtol=1e-5)


def test_refusals():
    layer = mixer()
    with pytest.raises(ValueError, match=r"19 tokens are not the 20 of a grid of \(5, 4\)"):
        layer(randn(2, 19, 12), (5, 4))
    for kept in (choose(2, 20, 10), choose(1, 20, 11), choose(2, 20, 11).int()):
        with pytest.raises(ValueError, match="one int64 raster position a token"):
            layer(randn(2, 11, 12), (5, 4), kept)
    with pytest.raises(ValueError, match=r"21 tokens cannot be left of a grid of \(5, 4\)"):
        layer(randn(1, 21, 12), (5, 4), torch.arange(21)[None])
    with pytest.raises(ValueError, match="conv_size=4"):
        mixer(conv_size=4)
    with pytest.raises(ValueError, match="patch_size=7 is odd"):
        build(patch_size=7)
    with pytest.raises(ValueError, match="global_pool='token'"):
        build(global_pool="token")
    with pytest.raises(ValueError, match=r"tap_norms=\(2,\) must be blocks from 0 to 1"):
        build(tap_norms=(2,))
    with pytest.raises(ValueError, match=r"depthwise_layers=\(3,\) must be blocks from 0 to 2"):
        build(depthwise_layers=(3,))
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        build().forward_intermediates(image(), output_fmt="NHWC")


# ---- image sizes


def test_image_sizes():
    model = build()
    for size, grid in (((48, 48), (6, 6)), ((64, 24), (8, 3)), ((50, 41), (7, 6)), ((8, 8), (1, 1)), ((9, 7), (2, 1))):
        x = image(1, size)
        assert model.patch_embed.dynamic_feat_size(size) == grid
        assert model.patch_embed(x).shape == (1, grid[0] * grid[1], 16)
        out = model(x)
        changed = copy.deepcopy(model)
        changed.set_input_size(size)
        assert changed.pos_embed.shape[1] == grid[0] * grid[1] and changed.pos_embed.requires_grad
        torch.testing.assert_close(changed(x), out)
    for wrong in (image(1, (0, 48)), image()[0], image()[:, :2]):
        with pytest.raises(ValueError, match=r"images \[B, 3, H, W\] of at least one pixel"):
            model(wrong)


def test_halved_maps_are_padded_with_zeros():
    """Padding the image instead would let the stem's norms and biases in."""
    embed = build().patch_embed
    x = image(1, (45, 50))
    maps = embed.convs(embed.stem(x))
    assert maps.shape[2:] == (23, 25)
    expected = embed.projection(F.pad(maps, (0, 3, 0, 1))).flatten(2).transpose(1, 2)
    assert torch.equal(embed(x), expected)
    assert not torch.allclose(embed(F.pad(x, (0, 6, 0, 3))), expected, atol=1e-3)


# ---- timm's conventions


def test_features_only():
    model = timm.create_model("plain_mamba_l1", features_only=True, img_size=32, depth=4).eval()
    maps = model(image(1, (48, 32)))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 3, 2)] * 3
    assert model.feature_info.channels() == [192] * 3 and model.feature_info.reduction() == [16] * 3
    dense = timm.create_model(
        "plain_mamba_l1", features_only=True, img_size=32, depth=4, out_indices=(1, 3), tap_norms=(1,)
    )
    names = {key.split(".")[1] for key in dense.state_dict()}
    assert {"norm_layer1", "ln1"} <= names and "head" not in names
    for tap in dense.eval()(image(1, (32, 32))):  # fresh norms
        torch.testing.assert_close(tap.mean(1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)


def test_intermediates():
    model, x = build(), image()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 16, 6, 6)] * 3
    tokens = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tokens[2], final)
    torch.testing.assert_close(model.ln1(maps[0].flatten(2).transpose(1, 2)), tokens[0])
    only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], maps[1])
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers(indices=[0, 1], prune_norm=True) == [0, 1]
    left = pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(left, maps)) and len(pruned.layers) == 2


def test_maps_under_their_own_norms():
    model, x = build(tap_norms=(0,)), image()
    own = [key for key in model.state_dict() if key.startswith("norm_layer")]
    assert own == ["norm_layer0.weight", "norm_layer0.bias"]
    raw = []
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: raw.append(out))
    final, taps = model.forward_intermediates(x, output_fmt="NLC")
    assert torch.equal(taps[0], model.norm_layer0(raw[0])) and torch.equal(taps[1], raw[1])
    assert torch.equal(taps[2], final)
    model.prune_intermediate_layers([0, 2], prune_norm=True)
    assert isinstance(model.ln1, nn.LayerNorm)
    model.prune_intermediate_layers([0], prune_norm=True)
    assert isinstance(model.ln1, nn.Identity)


def test_classifier():
    model, x = build(), image()
    assert model.get_classifier() is model.head
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(1))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.double().reset_classifier(5)
    assert model(x.double()).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(5, "")
    assert model(x.double()).shape == (2, 36, 5)


def test_create_model():
    model = timm.create_model("plain_mamba_l1", num_classes=5, in_chans=1, drop_path_rate=0.2, img_size=32, depth=5)
    assert model.train()(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [block.dw is not None for block in model.layers] == [True] + [False] * 4
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("plain_mamba_l1", pretrained=True)


def test_parameter_groups():
    model = build(tap_norms=(1,))
    undecayed = model.no_weight_decay()
    expected = {"pos_embed"} | {f"layers.{i}.mamba.{name}" for i in range(3) for name in ("A_log", "D", "direction_Bs")}
    assert undecayed == expected
    names = {id(p): key for key, p in model.named_parameters()}
    plain, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=undecayed)
    assert plain["weight_decay"] == 0 and all(p.dim() > 1 for p in decayed["params"])
    assert not expected & {names[id(p)] for p in decayed["params"]}
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=undecayed, layer_decay=0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale["pos_embed"] == scale["patch_embed.stem.0.weight"] == min(scale.values()) < scale["head.weight"] == 1
    assert len({scale[f"layers.{i}.mamba.D"] for i in range(3)}) == 3
    assert scale["ln1.weight"] == scale["norm_layer1.weight"] == scale["layers.2.mamba.D"]


def test_training_and_checkpointing():
    """BatchNorm sees batches twice under checkpointing, so its statistics are frozen here."""
    model = build(drop_path_rate=0.2).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        torch.manual_seed(0)
        each(image(4)).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, key
        assert torch.equal(p.grad, q.grad), key


def test_copies():
    model = build()
    model(image()).sum().backward()
    expected = model(image())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image()), expected)


def test_threads():
    model = build()
    sizes = [(48, 48), (24, 56), (40, 32), (16, 16)]
    with torch.no_grad():
        expected = [model(image(1, size)) for size in sizes]
    results = {}

    def run(i):
        with torch.no_grad():
            results[i] = [model(image(1, sizes[(i + j) % 4])) for j in range(4)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected[(i + j) % 4]) for i in range(4) for j, out in enumerate(results[i]))


# ---- checkpoints


def official(model):
    """Weights as released."""
    named = {}
    for key, value in model.state_dict().items():
        named[f"head.fc.{key[5:]}" if key.startswith("head.") else f"backbone.{key}"] = value
    return named


def test_checkpoint_files(tmp_path):
    tiny = {"img_size": 32, "depth": 2, "num_classes": 1000}
    model = shake(timm.create_model("plain_mamba_l1", **tiny)).eval()
    path, x = tmp_path / "l1.pth", image(1, (32, 32))
    torch.save({"meta": {"epoch": 300}, "state_dict": official(model), "optimizer": {}}, path)
    expected = model(x)
    fresh = timm.create_model("plain_mamba_l1", **tiny).eval()
    assert load_official(fresh, path) is fresh and torch.equal(fresh(x), expected)
    loaded = timm.create_model("plain_mamba_l1", checkpoint_path=str(path), **tiny).eval()
    assert torch.equal(loaded(x), expected)
    file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    fewer = timm.create_model("plain_mamba_l1", **file, **{**tiny, "num_classes": 5}).eval()
    torch.testing.assert_close(fewer.forward_features(x), model.forward_features(x))
    larger = timm.create_model("plain_mamba_l1", **file, **{**tiny, "img_size": (48, 64)}).eval()
    model.set_input_size((48, 64))
    assert torch.equal(larger.pos_embed, model.pos_embed)
    headless = timm.create_model("plain_mamba_l1", **{**tiny, "num_classes": 0}).eval()
    torch.testing.assert_close(load_official(headless, path)(x), fresh.forward_head(fresh.forward_features(x), True))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_official(model, tmp_path / "l2.pth")


def test_other_keys_are_listed():
    model = build()
    weights = official(build(seed=5))
    before = copy.deepcopy(model.state_dict())
    weights["backbone.layers.1.mamba.gamma"] = weights.pop("backbone.layers.1.mamba.D")
    weights["decode_head.conv.weight"] = torch.zeros(3)
    weights["backbone.layers.2.mamba.A_log"] = torch.zeros(32, 5)
    with pytest.raises(ValueError) as error:
        load_official(model, weights)
    for part in (
        "missing: layers.1.mamba.D;", "unknown: decode_head.conv.weight, layers.1.mamba.gamma;",
        "of another shape: layers.2.mamba.A_log (32, 5) for (32, 4)",
    ):  # fmt: skip
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: norm_layer1.bias, norm_layer1.weight\)"):
        load_official(build(tap_norms=(1,)), official(model))
    with pytest.raises(RuntimeError, match="decode_head.conv.weight"):
        model.load_state_dict(weights)


def test_names_and_positions_of_checkpoints():
    model = build()
    weights = official(model)
    assert set(official_names(weights)) == set(model.state_dict())
    no_counters = {key: value for key, value in weights.items() if "num_batches" not in key}
    assert torch.equal(load_official(build(seed=3), no_counters)(image()), model(image()))
    wide = build(img_size=(32, 64))
    assert fit_weights(weights, wide)["pos_embed"].shape == (1, 32, 16)
    with pytest.raises(ValueError, match="32 positions are no square"):
        fit_weights(official(wide), model)


# ---- compilers and number formats


def test_one_graph():
    torch._dynamo.reset()
    model = build()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(image()), model(image()), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_one_graph_of_kept_tokens():
    torch._dynamo.reset()
    block, kept, x = build().layers[0], choose(2, 36, 20), randn(2, 20, 16)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x, (6, 6), kept), block(x, (6, 6), kept), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_export_with_any_batch(monkeypatch):
    monkeypatch.setattr(orders, "_cache", type(orders._cache)())
    model = build(depth=2, depthwise_layers=())
    batch = torch.export.Dim("batch", min=1, max=64)
    for _ in range(2):  # with an empty cache, and with a full one
        program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
        x = image(5, seed=2)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)
    assert all(type(t) is torch.Tensor for paths in orders._cache.values() for t in paths)


@pytest.mark.slow
def test_onnx(tmp_path):
    if torch.__version__.startswith("2.6."):
        pytest.skip("the exporter of torch 2.6 does not translate BatchNorm where the batch size is open")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = build(depth=2), str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (image(),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = image(5, seed=2)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build()
    with torch.no_grad():
        expected = model(image())
        out = copy.deepcopy(model).to(dtype)(image().to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(image())
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    double = copy.deepcopy(model).double()(image().double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=1e-4)


def test_step_sizes_stay_wide_under_autocast():
    layer, y, signals = mixer(), randn(2, 20, 12), ScanSignals()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(y, (5, 4), signals=signals)
        torch.testing.assert_close(layer(y, (5, 4)), out, atol=0.02, rtol=0.02)
    assert all(dt.dtype == torch.float32 for dt in signals.delta)
    torch.testing.assert_close(out.float(), layer(y, (5, 4)), atol=0.1, rtol=0.1)
