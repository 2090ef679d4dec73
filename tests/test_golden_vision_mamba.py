"""Vision Mamba against the published implementation."""

import re

import torch
from goldens import Case, cases, check_settings, close, read, settings

from tokenzoo.models import VisionMamba
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.vim_embed import class_rows
from tokenzoo.models.vim_mixer import VimMixer

FLAGS = {
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "final_pool_type": "mean",
    "if_abs_pos_embed": True, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True,
    "use_middle_cls_token": True,
}  # fmt: skip
# a flag as the metadata spells it -> the option
VARIANT_FLAGS = {
    "if_cls_token=False": {"cls_position": "none"},
    "final_pool_type=mean": {"global_pool": "avg"},
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


def below(file: str, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a file below a prefix, which is cut off."""
    return {key[len(prefix) :]: value for key, value in read(file)[0].items() if key.startswith(prefix)}


def build(file: str, weights: dict[str, torch.Tensor] | None = None, **options) -> VisionMamba:
    meta = read(file)[1]
    config = settings(meta["config"])
    check_settings(config, "img_size", "patch_size", "stride", "embed_dim", "depth", "d_state", "num_classes")
    assert settings(meta["flags"]) == FLAGS
    model = VisionMamba(**config, **options).eval()
    model.load_state_dict(below(file, "weights/") if weights is None else weights)
    return model


@cases("vision_mamba", "vim_micro", lambda c: c.name == "intermediate")
def test_model(case: Case):
    model = build(case.file)
    tensors, meta = read(case.file)
    assert class_rows("middle", model.patch_embed.num_patches) == (int(meta["token_position"]),)
    seen = {}
    for index, block in enumerate(model.layers):
        block.register_forward_hook(lambda module, args, out, index=index: seen.update({index: out}))
    found = {}
    with torch.no_grad():
        tokens = model.forward_features(tensors["input"])
        found["features"] = model.forward_head(tokens, pre_logits=True)
        found["logits"] = model(tensors["input"])
    expected = below(case.file, "output/")
    assert set(expected) == set(found)
    for name, value in expected.items():
        close(found[name], value, 1e-5)
    recorded = case.matching(".*")
    assert recorded
    for name, value in recorded.items():
        index, which = re.fullmatch(r"block(\d+)/(hidden|residual)_row0", name).groups()
        h, res = seen[int(index)]
        close((h if which == "hidden" else res)[:1], value, 1e-5)


@cases("vision_mamba", "vim_micro", lambda c: c.name.startswith("variant_"))
def test_variant(case: Case):
    tensors, meta = read(case.file)
    flags = [f"{name}={value}" for name, value in re.findall(r"(\w+)=(\w+)", meta[case.name])]
    check_settings(dict.fromkeys(flags), *VARIANT_FLAGS)
    options = {key: value for flag in flags for key, value in VARIANT_FLAGS[flag].items()}
    weights = below(case.file, "weights/")
    if options["cls_position"] == "none":
        row, positions = int(meta["token_position"]), weights["pos_embed"]
        weights["pos_embed"] = torch.cat([positions[:, :row], positions[:, row + 1 :]], dim=1)
        del weights["cls_token"]
    if options["cls_position"] == "both":
        head = weights.pop("cls_token")
        weights |= {"cls_token_head": head, "cls_token_tail": head.flip(-1)}
        weights["pos_embed"] = torch.cat([weights["pos_embed"], weights["pos_embed"][:, :1]], dim=1)
    model = build(case.file, weights, **options)
    assert set(case.matching(".*")) == {"logits"}
    with torch.no_grad():
        close(model(tensors["input"]), case["logits"], 1e-5)


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


@cases("vision_mamba", "mixer")
def test_mixer(case: Case):
    tensors = read(case.file)[0]
    outputs = below(case.file, "output/")
    check_settings(outputs, *MIXERS)
    for name, expected in outputs.items():
        mixer = build_mixer(case.file, **MIXERS[name])
        signals = ScanSignals()
        with torch.no_grad():
            close(mixer(tensors["input"]), expected, 1e-5)
            close(mixer(tensors["input"], signals=signals), expected, 1e-5)
        assert len(signals.y) == mixer.directions
        if name == "y":
            gated = [y * signals.gate for y in signals.y]
            found = {"out_f": gated[0], "out_b_scan_order": gated[1].flip(-1)}
            recorded = case.matching(".*")
            assert set(recorded) == set(found)
            for key, value in recorded.items():
                close(found[key], value, 1e-5)
