"""Vision Mamba: sizes and costs of the published models, invariants, timm's conventions, checkpoints."""

import argparse
import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn

from tokenzoo.layers.causal_conv import causal_conv1d
from tokenzoo.models import VisionMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.vim import mixer as vim_mixer
from tokenzoo.models.vim.costs import macs, mixer_macs
from tokenzoo.models.vim.embed import class_rows, fit_positions, insert_rows, split_rows, take_rows
from tokenzoo.models.vim.mixer import VimMixer
from tokenzoo.models.vim.sizes import default_cfgs
from tokenzoo.models.vim.weights import checkpoint_filter_fn, load_official

# size -> parameters, multiply-adds in billions at 224: one direction as published, both; both at stride 8
PUBLISHED = {
    "tiny": (7_148_008, 1.449, 1.82, 6.75),
    "small": (25_796_584, 5.076, 5.91, 21.91),
    "base": (97_598_440, 18.87, 20.89, 77.4),
}
PLACES = ("middle", "first", "both", "none")
places = pytest.mark.parametrize("place", PLACES)
kinds = pytest.mark.parametrize("kind", ["none", "v1", "v2"])


def build(seed=0, **options):
    """A tiny model in evaluation mode with uneven weights; 25 patches, the class token behind 12 of them."""
    torch.manual_seed(seed)
    config = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 7}
    model = VisionMamba(**{**config, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def build_mixer(seed=0, **options):
    torch.manual_seed(seed)
    mixer = VimMixer(24, **{"d_state": 4, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mixer


def image(batch=2, size=(40, 40), seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, length=13, dim=24, seed=2):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def skeleton(name, **options):
    """A registered model without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


# ---- the published figures


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_and_costs(size):
    parameters, one, both, fine = PUBLISHED[size]
    for name in (f"vim_{size}", f"vim_{size}_patch16_224"):
        model = skeleton(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert macs(model, directions=1) / 1e9 == pytest.approx(one, abs=6e-4 if one < 10 else 6e-3)
        assert macs(model) / 1e9 == pytest.approx(both, abs=6e-3)
    model = skeleton(f"vim_{size}_patch16_stride8_224")
    assert model.patch_embed.num_patches == 729 and model.pos_embed.shape[1] == 730
    assert class_rows("middle", 729) == (364,)
    assert macs(model) / 1e9 == pytest.approx(fine, abs=6e-2)


def test_every_size_is_registered():
    assert len(default_cfgs) == 9
    for name in default_cfgs:
        assert timm.is_model(name)
        cfg = skeleton(name).pretrained_cfg
        assert cfg["architecture"] == name and not cfg["url"]
        assert cfg["crop_pct"] == 0.875 and cfg["interpolation"] == "bicubic"
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("vim_tiny", pretrained=True)


def test_costs_follow_the_closed_form():
    model = build()
    dim, inner, states, rank, length = 32, 64, 4, 2, 26
    side = length * (inner * 4 + inner * (rank + 2 * states) + rank * inner + 9 * inner * states + 2 * inner)
    ends = 25 * dim * 3 * 64 + dim * 7
    assert macs(model, directions=1) == ends + 3 * (6 * length * dim**2 + side)
    assert macs(model) == ends + 3 * (6 * length * dim**2 + 2 * side)
    parts = [macs(model, n) - ends for n in (26, 20, 10)]
    assert macs(model, (26, 20, 10)) == ends + sum(parts) // 3
    model.reset_classifier(0)
    assert macs(model) == ends - dim * 7 + 3 * (6 * length * dim**2 + 2 * side)


def test_costs_of_other_mixers():
    forward, shared, full = (mixer_macs(VimMixer(32, bimamba_type=kind), 10) for kind in ("none", "v1", "v2"))
    assert forward < shared < full and mixer_macs(VimMixer(32), 10, 1) == forward
    assert shared - forward == 10 * 64 * (9 * 16 + 2)  # another scan, the rest is shared
    with pytest.raises(ValueError, match="directions=2; this mixer has 1"):
        mixer_macs(VimMixer(32, bimamba_type="none"), 10, 2)
    with pytest.raises(ValueError, match="directions=0"):
        macs(build(), directions=0)
    with pytest.raises(ValueError, match="2 token counts for 3 blocks"):
        macs(build(), (10, 10))


def test_embedding_costs_what_its_convolution_does():
    embed = build(img_size=(40, 64), stride=4).patch_embed
    shape = embed.proj(torch.zeros(1, 3, 40, 64)).shape
    assert shape[2:] == embed.grid_size == (9, 15)
    assert embed.macs(embed.grid_size) == shape[2:].numel() * embed.proj.weight.numel()


# ---- the mixer


@kinds
def test_one_scan_a_mixer(kind, monkeypatch):
    calls = []
    scan = vim_mixer.selective_scan
    monkeypatch.setattr(vim_mixer, "selective_scan", lambda *a, **k: calls.append(a[0].shape) or scan(*a, **k))
    mixer = build_mixer(bimamba_type=kind)
    mixer(tokens())
    assert calls == [(2, 48 * mixer.directions, 13)]


@kinds
def test_signals_and_neutral_stretch_change_nothing(kind):
    mixer = build_mixer(bimamba_type=kind)
    plain = mixer(tokens())
    signals = ScanSignals()
    torch.testing.assert_close(mixer(tokens(), signals=signals), plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mixer(tokens(), lambda dt, direction, bias: dt), plain, atol=1e-6, rtol=1e-6)
    directions = mixer.directions
    assert [len(x) for x in (signals.delta, signals.raw_delta, signals.B, signals.C, signals.y)] == [directions] * 5
    for delta, raw, B, C, y in zip(signals.delta, signals.raw_delta, signals.B, signals.C, signals.y):
        assert delta.shape == raw.shape == y.shape == signals.gate.shape == (2, 48, 13)
        assert B.shape == C.shape == (2, 4, 13)
    torch.testing.assert_close(signals.delta[0], F.softplus(signals.raw_delta[0] + mixer.dt_proj.bias[:, None]))
    out = mixer.out_proj((sum(signals.y) * signals.gate).transpose(1, 2))
    torch.testing.assert_close(out / (2 if kind == "v2" else 1), plain, atol=1e-6, rtol=1e-5)


def swapped(module):
    """A copy whose forward and backward parameters have changed places."""
    other = copy.deepcopy(module)
    weights = module.state_dict()

    def partner(key):
        for name in ("conv1d", "x_proj", "dt_proj"):
            for suffix in ("weight", "bias"):
                one, two = f"{name}.{suffix}", f"{name}_b.{suffix}"
                if key.endswith(two):
                    return key[: -len(two)] + one
                if key.endswith(one):
                    return key[: -len(one)] + two
        for one, two in (("A_log", "A_b_log"), ("D_b", "D"), ("D", "D_b"), ("A_b_log", "A_log")):
            if key.split(".")[-1] == one:
                return key[: -len(one)] + two
        return key

    other.load_state_dict({key: weights[partner(key)] for key in weights})
    return other


def test_directions_mirror_each_other():
    """Signals are in token order: those of one direction are the other's on the reversed sequence."""
    mixer = build_mixer()
    signals, mirrored = ScanSignals(), ScanSignals()
    out = mixer(tokens(), signals=signals)
    back = swapped(mixer)(tokens().flip(1), signals=mirrored)
    torch.testing.assert_close(back.flip(1), out, atol=1e-6, rtol=1e-5)
    for name in ("delta", "raw_delta", "B", "C", "y"):
        one, two = getattr(signals, name), getattr(mirrored, name)
        torch.testing.assert_close(two[1].flip(-1), one[0], atol=1e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(two[0].flip(-1), one[1], atol=1e-6, rtol=1e-5, msg=name)
    assert (signals.y[0] - signals.y[1]).abs().max() > 0.01


def test_stretch_sees_steps_in_scan_order():
    mixer, signals, seen = build_mixer(), ScanSignals(), {}

    def stretch(dt, direction, of_zero):
        seen[direction] = dt, of_zero
        return dt

    mixer(tokens(), stretch, signals)
    assert list(seen) == ["forward", "backward"]
    torch.testing.assert_close(seen["forward"][0], signals.delta[0])
    torch.testing.assert_close(seen["backward"][0], signals.delta[1].flip(-1))
    torch.testing.assert_close(seen["forward"][1], F.softplus(mixer.dt_proj.bias))
    torch.testing.assert_close(seen["backward"][1], F.softplus(mixer.dt_proj_b.bias))


def test_stretch_decides_what_is_forgotten():
    """With endless decay, and a convolution that sees one token, no token knows of another."""
    mixer, x = build_mixer(d_conv=1), tokens()
    alone = torch.cat([mixer(x[:, i : i + 1]) for i in range(13)], dim=1)
    torch.testing.assert_close(mixer(x, lambda dt, direction, bias: dt + 1e4), alone, atol=1e-6, rtol=1e-5)
    assert (mixer(x) - alone).abs().max() > 1e-3
    # forgetting in one direction alone
    half = mixer(x, lambda dt, direction, bias: dt + 1e4 * (direction == "backward"))
    last = torch.cat([mixer(x[:, :12]), mixer(x)[:, 12:]], dim=1)
    torch.testing.assert_close(half[:, 12], last[:, 12], atol=1e-6, rtol=1e-5)
    assert (half[:, 0] - mixer(x)[:, 0]).abs().max() > 1e-4


@kinds
def test_mixer_trains(kind):
    mixer = build_mixer(bimamba_type=kind).train()
    x = tokens().requires_grad_()
    mixer(x).square().sum().backward()
    grads = [x.grad, *(p.grad for p in mixer.parameters())]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("length,kernel", [(13, 4), (2, 4), (5, 1)])
def test_convolution_is_the_causal_one(length, kernel):
    conv = build_mixer(d_conv=kernel).conv1d
    x = tokens(length=length, dim=48)
    expected = causal_conv1d(x.transpose(1, 2), conv.weight, conv.bias, activation=False).transpose(1, 2)
    torch.testing.assert_close(vim_mixer._causal_conv(x, conv), expected)


def test_divided_output():
    mixer = build_mixer()
    summed = build_mixer(if_divide_out=False)
    torch.testing.assert_close(summed(tokens()), 2 * mixer(tokens()))
    with pytest.raises(ValueError, match="bimamba_type='v3'; choose one of none, v1, v2"):
        VimMixer(24, bimamba_type="v3")


def test_start():
    """The published initial values."""
    torch.manual_seed(0)
    model = VisionMamba(img_size=64, embed_dim=96, depth=4, num_classes=11)
    for block in model.layers:
        mixer = block.mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 * 1.001
        assert mixer.dt_proj_b.bias.abs().max() == 0
        for log in (mixer.A_log, mixer.A_b_log):
            torch.testing.assert_close(log.exp(), torch.arange(1.0, 17).expand(192, -1))
        assert (mixer.D == 1).all() and (mixer.D_b == 1).all() and (block.norm.weight == 1).all()
        bound = 6**-0.5
        assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
        bound = 192**-0.5 / math.sqrt(4)
        assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound
    for tensor in (model.head.weight, model.pos_embed, model.cls_token):
        assert 0.015 < tensor.std() < 0.025
    assert model.head.bias.abs().max() == 0 and model.patch_embed.proj.bias.abs().max() == 0
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05)


# ---- the model


def run_layers(model, h):
    res = None
    for block in model.layers:
        h, res = block(h, res)
    return h, res


def test_reversed_sequence():
    """With an odd number of tokens, order and directions can be swapped together: the class token stays central."""
    model = build(img_size=32)
    x = model.embed_tokens(image(size=(32, 32)))
    assert x.shape[1] == 17
    mirrored = swapped(model)
    out = model.final_norm(*run_layers(model, x))
    back = mirrored.final_norm(*run_layers(mirrored, x.flip(1)))
    torch.testing.assert_close(back.flip(1), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mirrored.forward_head(back), model.forward_head(out), atol=1e-5, rtol=1e-5)
    assert (
        model.forward_head(model.final_norm(*run_layers(model, x.flip(1)))) - model.forward_head(out)
    ).abs().max() > 1e-3


def test_zero_tokens_stay_zero():
    model = build()
    x = model.embed_tokens(image())
    x[:, 5] = 0
    h, res = x, None
    for block in model.layers:
        h, res = block(h, res)
        assert h[:, 5].abs().max() == 0 and res[:, 5].abs().max() == 0
        assert h[:, 6].abs().max() > 0


@places
def test_images_do_not_influence_each_other(place):
    model = build(cls_position=place)
    x = image(3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place,count,expected", [
    ("middle", 24, (12,)), ("middle", 25, (12,)), ("first", 25, (0,)), ("both", 25, (0, 26)), ("none", 25, ()),
])  # fmt: skip
def test_rows_of_class_tokens(place, count, expected):
    assert class_rows(place, count) == expected
    patches, rows = torch.randn(2, count, 3), torch.randn(2, len(expected), 3)
    x = insert_rows(patches, rows, expected)
    assert x.shape == (2, count + len(expected), 3)
    assert torch.equal(take_rows(x, expected), rows)
    assert all(torch.equal(a, b) for a, b in zip(split_rows(x, expected), (patches, rows)))


@places
def test_class_tokens_enter_in_their_places(place):
    model = build(cls_position=place)
    x = image()
    found, classes = split_rows(model.embed_tokens(x), class_rows(place, 25))
    positions, own = split_rows(model.pos_embed, class_rows(place, 25))
    torch.testing.assert_close(found, model.patch_embed(x) + positions)
    parameters = [p for name, p in model.named_parameters() if name.startswith("cls_token")]
    assert len(parameters) == model.num_class_tokens == classes.shape[1]
    if parameters:
        torch.testing.assert_close(classes, (torch.cat(parameters, dim=1) + own).expand(2, -1, -1))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    out, tokens_of_class = split_rows(model.forward_features(x), class_rows(place, 25))
    torch.testing.assert_close(pooled, (tokens_of_class if parameters else out).mean(dim=1))


def test_head_takes_other_rows():
    model = build()
    x = model.forward_features(image())
    torch.testing.assert_close(model.forward_head(x), model.head(x[:, 12]))
    torch.testing.assert_close(model.forward_head(x, rows=(3,)), model.head(x[:, 3]))
    torch.testing.assert_close(model.forward_head(x[:, 2:-4]), model.head(x[:, 2 + 9]))  # 19 patches


def test_block_in_parts():
    model = build()
    h, res = model.layers[0](model.embed_tokens(image()))
    block = model.layers[1]
    stream = block.add(h, res)
    torch.testing.assert_close(stream, h + res)
    out = block(h, res)
    assert torch.equal(out[1], stream) and torch.equal(out[0], block.mix(stream))
    assert torch.equal(out[0], block.mixer(block.norm(stream)))


def test_stochastic_depth():
    model = build(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3]) and model.drop_path.drop_prob == 0.4
    x = image()
    expected = model(x)
    assert not torch.equal(model.train()(x), expected)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1.0
    h, res = model.layers[0](model.embed_tokens(x))
    torch.testing.assert_close(model.forward_features(x), model.norm_f(h + res))  # only the first mixer is left
    assert torch.equal(build(depth=5).train()(x), expected)


# ---- number formats


def test_autocast_scans_in_float32(monkeypatch):
    model = build()
    x = image()
    expected, seen = model(x), []
    scan = vim_mixer.selective_scan

    def spy(u, delta, A, B, C, D, **options):
        out, state = scan(u, delta, A, B, C, D, return_last_state=True, **options)
        seen.append((u.dtype, A.dtype, options["delta_bias"].dtype, state.dtype))
        return out

    monkeypatch.setattr(vim_mixer, "selective_scan", spy)
    with torch.autocast("cpu", torch.bfloat16):
        h, res = run_layers(model, model.embed_tokens(x))
        signals = ScanSignals()
        model.layers[0].mix(res, signals=signals)
        assert res.dtype == torch.float32 and signals.delta[0].dtype == torch.float32
        torch.testing.assert_close(model(x).float(), expected, atol=0.05, rtol=0.05)
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_formats(dtype, monkeypatch):
    model = build()
    scan, rates = vim_mixer.selective_scan, []
    monkeypatch.setattr(vim_mixer, "selective_scan", lambda *args, **kw: rates.append(args[2]) or scan(*args, **kw))
    with torch.no_grad():
        expected = model(image())
        other = copy.deepcopy(model).to(dtype)
        h, res = other.layers[0](other.embed_tokens(image().to(dtype)))
        assert h.dtype == dtype and res.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        out = other(image().to(dtype))
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
        maps = other.forward_intermediates(image().to(dtype), intermediates_only=True)
        assert all(m.dtype == dtype for m in maps)
    exact = -other.layers[0].mixer.A_log.double().exp()
    torch.testing.assert_close(rates[-3][:64].double(), exact, rtol=1e-6, atol=0)  # rounded weights, exact exponentials


def test_large_streams_stay_exact():
    """In bfloat16 a stream of 1000 would swallow a mixer's output."""
    block = build().layers[1].to(torch.bfloat16)
    stream = block.add(torch.full((1, 2, 32), 0.25, dtype=torch.bfloat16), torch.full((1, 2, 32), 1000.0))
    assert (stream == 1000.25).all()


# ---- timm's conventions


@pytest.mark.parametrize("name,side", [("vim_tiny", 4), ("vim_tiny_patch16_stride8_224", 7)])
def test_features_only(name, side):
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), img_size=64).eval()
    maps = model(image(1, (64, 64)))
    assert [tuple(m.shape) for m in maps] == [(1, 192, side, side)] * 2
    assert model.feature_info.channels() == [192, 192] and len(model.model.layers) == 3
    assert model.feature_info.reduction() == [16 if side == 4 else 8] * 2


@places
def test_intermediates(place):
    model = build(cls_position=place, img_size=(40, 24))
    x = image(size=(40, 24))
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    h, res = model.embed_tokens(x), None
    for block, found in zip(model.layers, maps, strict=True):
        h, res = block(h, res)
        patches, classes = split_rows(h + res, class_rows(place, 15))
        torch.testing.assert_close(found, patches.transpose(1, 2).reshape(2, 32, 5, 3))
    pairs = model.forward_intermediates(x, [2], True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(pairs[0], (patches, classes))
    (normed,) = model.forward_intermediates(x, [2], norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed, split_rows(final, class_rows(place, 15))[0])
    ran = []
    model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    assert not ran and torch.equal(early[0], maps[1])
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    left = pruned.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(left, maps)) and len(pruned.layers) == 2
    with pytest.raises(ValueError, match="output_fmt='NHWC'; choose"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_classifier():
    model = build()
    x = image()
    features = model.forward_features(x)
    assert model.get_classifier() is model.head
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features[:, 12])
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(5, "avg")
    patches = torch.cat([features[:, :12], features[:, 13:]], dim=1)
    torch.testing.assert_close(model(x), model.head(patches.mean(dim=1)))
    model.double().reset_classifier(4)
    assert model(x.double()).shape == (2, 4) and model.num_classes == 4
    model.reset_classifier(0, "")
    assert model(x.double()).shape == features.shape
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(4, "max")
    with pytest.raises(ValueError, match="global_pool='token' with cls_position='none'"):
        build(cls_position="none", global_pool="token")
    with pytest.raises(ValueError, match="cls_position='last'; choose one of middle, first, both, none"):
        build(cls_position="last")


def test_create_model():
    model = timm.create_model("vim_tiny", num_classes=5, in_chans=1, img_size=32, depth=3, drop_path_rate=0.1).train()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert timm.create_model("vim_tiny", img_size=32, depth=1, patch_size=8).patch_embed.grid_size == (4, 4)


def test_parameter_groups():
    model = build()
    skipped = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.2.mixer.A_log", "layers.0.mixer.D_b"} <= skipped
    assert skipped <= {name for name, _ in model.named_parameters()} and len(skipped) == 2 + 3 * 4
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=skipped, layer_decay=0.5)
    names = {id(p): key for key, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.proj.weight"] == min(scale.values())
    ladder = [scale[f"layers.{i}.mixer.in_proj.weight"] for i in range(3)]
    assert ladder == sorted(set(ladder)) and scale["head.weight"] == 1
    assert not any(decay[name] for name in skipped) and decay["layers.0.mixer.in_proj.weight"] == 0.05


@places
def test_checkpointing_gives_equal_gradients(place):
    model = build(cls_position=place, drop_path_rate=0.3).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    runs = []
    for each in (model, other):
        each.layers[1].mixer.register_forward_pre_hook(lambda *_, each=each: runs.append(each))
        torch.manual_seed(3)  # stochastic depth is drawn again in the recomputation
        each(image()).square().sum().backward()
    assert runs == [model, other, other]
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad is not None and torch.equal(p.grad, q.grad), key


def test_copies():
    model = build()
    model(image()).sum().backward()
    expected = model(image())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image()), expected)


# ---- image sizes


@places
@pytest.mark.parametrize("stride", [8, 4])
def test_sizes(place, stride):
    model = build(cls_position=place, stride=stride)
    dynamic = build(cls_position=place, stride=stride, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x, other = image(), image(size=(64, 32))
    assert torch.equal(dynamic(x), model(x))
    changed = copy.deepcopy(model)
    changed.set_input_size((64, 32))
    assert changed.patch_embed.grid_size == ((8, 4) if stride == 8 else (15, 7))
    torch.testing.assert_close(changed(other), dynamic(other))
    assert dynamic.forward_intermediates(other)[1][0].shape[2:] == changed.patch_embed.grid_size
    with pytest.raises(ValueError, match=r"\(64, 32\) pixels does not match the model's \(40, 40\)"):
        model(other)
    words = rf"not a whole number of \(8, 8\) patches at a stride of \({stride}, {stride}\)"
    with pytest.raises(ValueError, match=words):
        dynamic(image(size=(61, 32)))
    with pytest.raises(ValueError, match="not a whole number"):
        build(img_size=61)
    with pytest.raises(ValueError, match="not a whole number"):
        dynamic(image(size=(4, 40)))
    with pytest.raises(ValueError, match="patch size"):
        model.set_input_size(patch_size=4)


@places
def test_class_rows_are_not_interpolated(place):
    positions = build(cls_position=place).pos_embed.detach().clone()
    patches, rows = split_rows(positions, class_rows(place, 25))
    for new in ((7, 7), (3, 4)):
        fitted, kept = split_rows(fit_positions(positions, place, (5, 5), new), class_rows(place, new[0] * new[1]))
        assert torch.equal(kept, rows)
        maps = patches.transpose(1, 2).reshape(1, 32, 5, 5)
        expected = F.interpolate(maps, new, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        torch.testing.assert_close(fitted, expected)
    assert fit_positions(positions, place, (5, 5), (5, 5)) is positions


def test_same_count_on_another_grid():
    """32 tokens are not 32 tokens: 8 x 4 and 4 x 8 have other positions."""
    model = build(img_size=(64, 32))
    before = model.pos_embed.detach().clone()
    model.pos_embed.requires_grad_(False)
    model.set_input_size((32, 64))
    assert model.pos_embed.shape == before.shape and (model.pos_embed - before).abs().max() > 0.01
    assert not model.pos_embed.requires_grad


# ---- checkpoints


def saved(path, **trees):
    torch.save({**trees, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
    return str(path)


def test_official_files(tmp_path):
    own, averaged = build(seed=1), build(seed=2)
    weights = {f"module.{key}": value for key, value in own.state_dict().items()}
    both = saved(tmp_path / "both.pth", model=weights, model_ema=averaged.state_dict())
    alone = saved(tmp_path / "alone.pth", model=weights)
    for path, ema, source in ((both, True, averaged), (both, False, own), (alone, True, own), (alone, False, own)):
        model = load_official(build(), path, ema=ema)
        assert torch.equal(model(image()), source(image()))
    assert set(checkpoint_filter_fn({"model": weights}, build())) == set(own.state_dict())
    filtered = checkpoint_filter_fn(torch.load(both, weights_only=False), build())
    assert all(torch.equal(filtered[key], value) for key, value in averaged.state_dict().items())


@places
def test_positions_are_fitted(place, tmp_path):
    source = build(seed=1, cls_position=place)
    path = saved(tmp_path / "weights.pth", model=source.state_dict())
    model = load_official(build(cls_position=place, img_size=(64, 48)), path)
    source.set_input_size((64, 48))
    torch.testing.assert_close(model(image(size=(64, 48))), source(image(size=(64, 48))))


def test_timm_loads_files(tmp_path):
    source = timm.create_model("vim_tiny", depth=2).eval()
    file = {"file": saved(tmp_path / "weights.pth", model=source.state_dict())}
    options = {"pretrained": True, "pretrained_cfg_overlay": file, "depth": 2}
    same = timm.create_model("vim_tiny", **options).eval()
    x = image(1, (224, 224))
    with torch.no_grad():
        assert torch.equal(same(x), source(x))
        fewer = timm.create_model("vim_tiny", num_classes=5, **options).eval()
        assert torch.equal(fewer.forward_features(x), source.forward_features(x)) and fewer(x).shape == (1, 5)
        other = timm.create_model("vim_tiny", img_size=64, **options).eval()
        source.set_input_size(64)
        assert torch.equal(other(image(1, (64, 64))), source(image(1, (64, 64))))
    maps = timm.create_model("vim_tiny", features_only=True, out_indices=(0,), **options)
    assert torch.equal(maps.model.layers[0].mixer.D, source.layers[0].mixer.D)


@pytest.mark.parametrize("made_with,remedy,keys", [
    ({"cls_position": "both"}, "cls_position='both'", ["cls_token_head", "cls_token_tail"]),
    ({"cls_position": "none"}, "cls_position='none'", ["cls_token"]),
    ({"bimamba_type": "v1"}, "bimamba_type='v1'", ["layers.2.mixer.conv1d_b.weight", "layers.0.mixer.D_b"]),
    ({"bimamba_type": "none"}, "bimamba_type='none'", ["layers.2.mixer.A_b_log", "layers.0.mixer.D_b"]),
])  # fmt: skip
def test_checkpoints_of_other_options(made_with, remedy, keys, tmp_path):
    weights = build(**made_with).state_dict()
    path = saved(tmp_path / "weights.pth", model=weights)
    with pytest.raises(ValueError) as error:
        load_official(build(), path)
    assert remedy in str(error.value) and all(key in str(error.value) for key in keys)
    ((name, value),) = made_with.items()
    assert f"{name}={value!r}" == remedy
    load_official(build(**{name: value}), path)
    with pytest.raises(ValueError, match="cls_position='middle' or 'first'|bimamba_type='v2'"):
        checkpoint_filter_fn(build().state_dict(), build(**made_with))


def test_checkpoints_of_other_models():
    model = build()
    weights = model.state_dict()
    gammas = {f"layers.{i}.mixer.gamma": torch.ones(32) for i in range(3)}
    with pytest.raises(ValueError, match=r"layer scales.*layers\.0\.mixer\.gamma, layers\.1\.mixer\.gamma"):
        checkpoint_filter_fn({**weights, **gammas}, model)
    with pytest.raises(ValueError, match=r"another architecture or depth.*layers\.3\.norm\.weight.*lacks: none"):
        checkpoint_filter_fn(build(depth=4).state_dict(), model)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight.*layers\.0\.mixer\.A_log"):
        checkpoint_filter_fn(vit, model)
    with pytest.raises(ValueError, match="33 rows besides the class token's"):
        checkpoint_filter_fn({**weights, "pos_embed": torch.zeros(1, 34, 32)}, model)


# ---- compilers


def test_one_graph():
    torch._dynamo.reset()
    model = build()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(image()), model(image()), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_export_with_any_batch():
    model = build(img_size=24, depth=2)
    x = image(3, (24, 24))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = image(5, (24, 24), seed=2)
    torch.testing.assert_close(program.module()(other), model(other), atol=1e-5, rtol=1e-5)


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = build(img_size=24, depth=1), str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch", min=1, max=64)
    x = image(3, (24, 24))
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = image(5, (24, 24), seed=2)
    (out,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(other).detach(), atol=1e-5, rtol=1e-4)


def test_learns():
    """A few steps on two brightness classes."""
    model = build(num_classes=2, depth=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    x = image(8) * 0.1 + torch.tensor([-1.0, 1.0]).repeat(4).view(8, 1, 1, 1)
    target = torch.tensor([0, 1]).repeat(4)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
