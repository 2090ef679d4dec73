"""Vision Mamba against the published implementation."""

import re

import torch
from goldens import Case, below, cases, check_settings, close, models, read, settings

from tokenzoo.models import VisionMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.vim.embed import class_rows
from tokenzoo.models.vim.mixer import VimMixer

FLAGS = {
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "final_pool_type": "mean",
    "if_abs_pos_embed": True, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True,
    "use_middle_cls_token": True,
}  # fmt: skip
# a flag that differs, as the metadata spell it -> the option
VARIANT_FLAGS = {
    "if_cls_token=True": {},
    "use_middle_cls_token=True": {},
    "if_divide_out=True": {},
    "if_divide_out=False": {"if_divide_out": False},
    "if_cls_token=False": {"cls_position": "none"},
    "final_pool_type=mean": {},  # the default without class tokens; with them they are what is pooled
    "use_middle_cls_token=False": {"cls_position": "first"},
    "use_double_cls_token=True": {"cls_position": "both"},
    "cls_token_head=cls_token": {},
    "cls_token_tail=cls_token": {},
}
# an output of the file of one mixer -> the options
MIXERS = {
    "y": {},
    "y_no_divide": {"if_divide_out": False},
    "y_unidirectional": {"bimamba_type": "none"},
    "y_v1": {"bimamba_type": "v1"},
}
SIZES = ("img_size", "patch_size", "stride")


def options_of(flags: dict[str, str]) -> dict:
    """Options of ours for flags of the authors; an unknown flag fails."""
    spelled = [f"{name}={value}" for name, value in flags.items()]
    check_settings(dict.fromkeys(spelled), *VARIANT_FLAGS)
    return {key: value for flag in spelled for key, value in VARIANT_FLAGS[flag].items()}


def build(file: str, weights: dict[str, torch.Tensor] | None = None, **options) -> VisionMamba:
    """The model of a file, or a variant of it with other weights and options."""
    meta = read(file)[1]
    config, flags = settings(meta["config"]), settings(meta["flags"])
    check_settings(config, "img_size", "patch_size", "stride", "embed_dim", "depth", "d_state", "num_classes")
    check_settings(flags, *FLAGS)
    others = {name: str(value) for name, value in flags.items() if value != FLAGS[name]}
    model = VisionMamba(**{**config, **options_of(others), **options}).eval()
    model.load_state_dict(below(file, "weights/") if weights is None else weights)
    return model


@models("vision_mamba", "logits")
def test_model(file: str):
    model = build(file)
    tensors, meta = read(file)
    rows = class_rows(model.cls_position, model.patch_embed.num_patches)
    assert rows[:1] == ((int(meta["token_position"]),) if rows else ())
    found = {}
    with torch.no_grad():
        tokens = model.forward_features(tensors["input"])
        found["features"] = model.forward_head(tokens, pre_logits=True)
        found["logits"] = model(tensors["input"])
    expected = below(file, "output/")
    assert set(expected) == set(found)
    for name, value in expected.items():
        close(found[name], value, 1e-5)


@cases("vision_mamba", lambda c: bool(c.matching(r"block\d+/(hidden|residual)_row0")))
def test_inside_of_model(case: Case):
    model, seen = build(case.file), {}
    for index, block in enumerate(model.layers):
        block.register_forward_hook(lambda module, args, out, index=index: seen.update({index: out}))
    with torch.no_grad():
        model(read(case.file)[0]["input"])
    for name, value in case.matching(".*").items():
        index, which = re.fullmatch(r"block(\d+)/(hidden|residual)_row0", name).groups()
        h, res = seen[int(index)]
        close((h if which == "hidden" else res)[:1], value, 1e-5)


@cases("vision_mamba", lambda c: c.has("logits"))
def test_variant(case: Case):
    meta = read(case.file)[1]
    flags = dict(re.findall(r"(\w+)=(\w+)", case.words))
    sizes = {name: int(flags.pop(name)) for name in SIZES if name in flags}
    options = options_of(flags) | sizes
    position = options.get("cls_position", "middle")
    weights, x = below(case.file, "weights/"), case.input(len(case["logits"]))
    own = {"pos_embed": case["pos_embed"]} if case.has("pos_embed") else {}
    own |= case.part("weights")
    if position == "none":
        row, positions = int(meta["token_position"]), weights["pos_embed"]
        weights["pos_embed"] = torch.cat([positions[:, :row], positions[:, row + 1 :]], dim=1)
        del weights["cls_token"]
    if position == "both":
        head = weights.pop("cls_token")
        weights |= {"cls_token_head": head, "cls_token_tail": head.flip(-1)}
        weights["pos_embed"] = torch.cat([weights["pos_embed"], weights["pos_embed"][:, :1]], dim=1)
    if "pos_embed" in own:  # of the size of its images
        options["img_size"] = tuple(x.shape[-2:])
    model = build(case.file, weights | own, **options)
    if "pos_embed" not in own:
        model.set_input_size(tuple(x.shape[-2:]))
    known = {"logits", "features", "input", "pos_embed", *(f"weights/{name}" for name in own)}
    assert set(case.matching(".*")) <= known
    with torch.no_grad():
        close(model(x), case["logits"], 1e-5)
        if case.has("features"):
            close(model.forward_head(model.forward_features(x), pre_logits=True), case["features"], 1e-5)


def build_mixer(file: str, **options) -> VimMixer:
    meta = read(file)[1]
    sizes = {key: int(value) for key, value in meta.items() if key not in ("what", "intermediate")}
    check_settings(sizes, "d_model", "d_state", "d_conv", "expand", "dt_rank")
    mixer = VimMixer(sizes.pop("d_model"), **sizes, **options).eval()
    weights = below(file, "weights/")
    own = mixer.state_dict()
    if mixer.bimamba_type == "v2":
        assert set(own) == set(weights)
    mixer.load_state_dict({key: weights[key] for key in own})
    return mixer


@models("vision_mamba", "y")
def test_mixer(file: str):
    x, outputs = read(file)[0]["input"], below(file, "output/")
    check_settings(outputs, *MIXERS)
    for name, expected in outputs.items():
        mixer = build_mixer(file, **MIXERS[name])
        signals = ScanSignals()
        with torch.no_grad():
            close(mixer(x), expected, 1e-5)
            close(mixer(x, signals=signals), expected, 1e-5)
        assert len(signals.y) == mixer.directions


@cases("vision_mamba", lambda c: c.has("out_f"))
def test_inside_of_mixer(case: Case):
    signals = ScanSignals()
    with torch.no_grad():
        build_mixer(case.file)(read(case.file)[0]["input"], signals=signals)
    gated = [y * signals.gate for y in signals.y]
    found = {"out_f": gated[0], "out_b_scan_order": gated[1].flip(-1)}
    recorded = case.matching(".*")
    assert set(recorded) == set(found)
    for key, value in recorded.items():
        close(found[key], value, 1e-5)
