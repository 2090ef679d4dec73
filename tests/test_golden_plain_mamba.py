"""PlainMamba against the published implementation."""

import torch
from goldens import MODEL, Case, cases, check_settings, close, models, read, settings

from tokenzoo.models import PlainMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.plain_mamba.checkpoint import load_official
from tokenzoo.models.plain_mamba.mixer import PATHS, PlainMambaMixer
from tokenzoo.models.plain_mamba.orders import scan_paths


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
    assert m["dt_init"] == "random"
    normed = tuple(index for index in taps if index != s["num_layers"] - 1)  # the last block has the last norm
    built = PlainMamba(
        img_size=s["img_size"], patch_size=s["patch_size"], embed_dim=s["embed_dims"], depth=s["num_layers"],
        stem_convs=s["num_convs_patch_embed"], depthwise_layers=tuple(s["layers_with_dwconv"]), d_state=m["d_state"],
        expand=m["expand"], conv_size=m["conv_size"], conv_bias=m["conv_bias"], bias=m["bias"], tap_norms=normed,
        num_classes=int(meta["num_classes"]),
    )  # fmt: skip
    assert m["default_hw_shape"] in (None, built.patch_embed.grid_size)
    return load_official(built, {"state_dict": part(file, "weights/")}).eval()


@cases("plain_mamba", lambda c: c.has("order"))
def test_paths(case: Case):
    check_settings(read(case.file)[1], "what")
    paths = scan_paths(tuple(map(int, case.short.split("x"))), torch.device("cpu"))
    for name, found in paths._asdict().items():
        assert found.dtype == torch.int64 and torch.equal(found, case[name]), name


@cases("plain_mamba", lambda c: c.name in ("hw", MODEL) and "output/y" in read(c.file)[0])
def test_mixer(case: Case):
    tensors = read(case.file)[0]
    grid = tuple(tensors["hw"].tolist())
    assert grid == settings(read(case.file)[1]["hw"])
    with torch.no_grad():
        close(mixer(case.file)(tensors["input"], grid), tensors["output/y"], 1e-5)


@cases("plain_mamba", lambda c: c.has("delta_before_scan"))
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


@models("plain_mamba", "logits")
def test_model(file: str):
    tensors, built = read(file)[0], model(file)
    taps, found = sorted(settings(read(file)[1]["out_indices"])), {}
    with torch.no_grad():
        found["logits"] = built(tensors["input"])
        tokens = built.forward_features(tensors["input"])
        found["features"] = built.forward_head(tokens, pre_logits=True)
        found["tokens_row0"] = tokens[:1]
        maps = built.forward_intermediates(tensors["input"][:1], list(taps))[1]
    found |= {f"out_index{index}_row0": tap for index, tap in zip(taps, maps)}
    expected = part(file, "output/")
    assert set(expected) <= set(found)
    for name, value in expected.items():
        close(found[name], value)
    if taps[-1] == len(built.layers) - 1:  # which leaves under the last norm
        close(maps[-1].flatten(2).transpose(1, 2), found["tokens_row0"])


@cases("plain_mamba", lambda c: bool(c.matching(r"block\d+_row0")))
def test_inside_of_model(case: Case):
    """Tokens as they leave blocks, without the norm that a tap would put on them."""
    seen, built = {}, model(case.file)
    for index, block in enumerate(built.layers):
        block.register_forward_hook(lambda module, args, out, index=index: seen.update({f"block{index}_row0": out}))
    with torch.no_grad():
        built(read(case.file)[0]["input"][:1])
    recorded = case.matching(".*")
    assert set(recorded) <= set(seen)
    for name, value in recorded.items():
        close(seen[name], value)


@cases("plain_mamba", lambda c: c.has("input") and c.has("output/logits"))
def test_resized(case: Case):
    built = model(case.file)
    with torch.no_grad():
        close(built(case["input"]), case["output/logits"])
        built.set_input_size(tuple(case["input"].shape[2:]))
        close(built(case["input"]), case["output/logits"])
