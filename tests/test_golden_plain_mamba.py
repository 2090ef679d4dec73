"""PlainMamba against the published implementation."""

import pytest
import torch
from goldens import Case, cases, check_settings, close, files, read, settings

from tokenzoo.models import PlainMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.plain_mamba_checkpoint import load_official
from tokenzoo.models.plain_mamba_mixer import PATHS, PlainMambaMixer
from tokenzoo.models.plain_mamba_orders import scan_paths

models = [
    pytest.param(name, id=name, marks=pytest.mark.golden)
    for name in files("plain_mamba")
    if "output/logits" in read(name)[0]
]


def part(file: str, start: str) -> dict[str, torch.Tensor]:
    return {key[len(start) :]: value for key, value in read(file)[0].items() if key.startswith(start)}


def mixer(file: str) -> PlainMambaMixer:
    """The recorded mixer."""
    meta = read(file)[1]
    check_settings(meta, "what", "d_model", "d_state", "conv_size", "hw")
    layer = PlainMambaMixer(int(meta["d_model"]), int(meta["d_state"]), conv_size=int(meta["conv_size"]))
    layer.load_state_dict(part(file, "weights/"))
    return layer.eval()


def model(file: str) -> PlainMamba:
    """The recorded model, loaded like a released checkpoint."""
    meta = read(file)[1]
    check_settings(meta, "what", "note", "config", "mamba_cfg", "out_indices", "num_classes")
    s, m, taps = (settings(meta[key]) for key in ("config", "mamba_cfg", "out_indices"))
    check_settings(
        s, "img_size", "patch_size", "embed_dims", "num_layers", "num_convs_patch_embed", "layers_with_dwconv"
    )
    check_settings(m, "d_state", "expand", "conv_size", "dt_init", "conv_bias", "bias", "default_hw_shape")
    assert m["dt_init"] == "random" and taps[-1] == s["num_layers"] - 1
    built = PlainMamba(
        img_size=s["img_size"], patch_size=s["patch_size"], embed_dim=s["embed_dims"], depth=s["num_layers"],
        stem_convs=s["num_convs_patch_embed"], depthwise_layers=tuple(s["layers_with_dwconv"]), d_state=m["d_state"],
        expand=m["expand"], conv_size=m["conv_size"], conv_bias=m["conv_bias"], bias=m["bias"], tap_norms=taps[:-1],
        num_classes=int(meta["num_classes"]),
    )  # fmt: skip
    assert built.patch_embed.grid_size == m["default_hw_shape"]
    return load_official(built, {"state_dict": part(file, "weights/")}).eval()


@cases("plain_mamba", "scan_orders")
def test_paths(case: Case):
    check_settings(read(case.file)[1], "what")
    paths = scan_paths(tuple(map(int, case.name.split("x"))), torch.device("cpu"))
    for name, found in paths._asdict().items():
        assert found.dtype == torch.int64 and torch.equal(found, case[name]), name


@cases("plain_mamba", "mixer", lambda c: c.name == "hw")
def test_mixer(case: Case):
    tensors = read(case.file)[0]
    grid = tuple(tensors["hw"].tolist())
    assert grid == settings(read(case.file)[1]["hw"])
    with torch.no_grad():
        close(mixer(case.file)(tensors["input"], grid), tensors["output/y"], 1e-5)


@cases("plain_mamba", "mixer", lambda c: c.name == "intermediate")
def test_inside_of_mixer(case: Case):
    tensors = read(case.file)[0]
    grid, layer, signals = tuple(tensors["hw"].tolist()), mixer(case.file), ScanSignals()
    with torch.no_grad():
        close(layer(tensors["input"], grid, signals=signals), tensors["output/y"], 1e-5)
        bias = layer.dt_proj.bias[:, None]
    order = scan_paths(grid, torch.device("cpu")).order
    known = {"C", "delta_before_scan", *(f"dir{k}/{name}" for k in range(PATHS) for name in ("B_plus_dir", "scan_out"))}
    assert set(case.matching(".*")) == known
    for k in range(PATHS):
        close(signals.raw_delta[k] + bias, case["delta_before_scan"], 1e-5)
        close(signals.delta[k], torch.nn.functional.softplus(case["delta_before_scan"] + bias), 1e-5)
        close(signals.C[k], case["C"], 1e-5)
        close(signals.B[k], case[f"dir{k}/B_plus_dir"], 1e-5)
        close(signals.y[k][:, :, order[k]], case[f"dir{k}/scan_out"], 1e-5)


@pytest.mark.parametrize("file", models)
def test_model(file: str):
    tensors, built = read(file)[0], model(file)
    found = {}
    with torch.no_grad():
        found["logits"] = built(tensors["input"])
        tokens = built.forward_features(tensors["input"])
        found["features"] = built.forward_head(tokens, pre_logits=True)
        found["tokens_row0"] = tokens[:1]
        found["out_index1_row0"], last = built.forward_intermediates(tensors["input"][:1], [1, 3])[1]
    assert set(part(file, "output/")) == set(found)
    for name, value in part(file, "output/").items():
        close(found[name], value)
    close(last.flatten(2).transpose(1, 2), found["tokens_row0"])  # the last tap leaves under the last norm


@cases("plain_mamba", "plain_mamba_micro", lambda c: c.name == "intermediate")
def test_inside_of_model(case: Case):
    assert set(case.matching(".*")) == {"block0_row0"}
    with torch.no_grad():
        _, (first,) = model(case.file).forward_intermediates(read(case.file)[0]["input"][:1], [0], output_fmt="NLC")
    close(first, case["block0_row0"])


@cases("plain_mamba", "plain_mamba_micro", lambda c: c.name == "resized")
def test_resized(case: Case):
    built = model(case.file)
    with torch.no_grad():
        close(built(case["input"]), case["output/logits"])
        built.set_input_size(tuple(case["input"].shape[2:]))
        close(built(case["input"]), case["output/logits"])
