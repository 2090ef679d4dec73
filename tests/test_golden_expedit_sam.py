"""Clustering inside the windows of a SAM image encoder against the published implementation."""

import re

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close, read
from timm.models.vision_transformer_sam import VisionTransformerSAM

import tokenzoo


def micro_model(case: Case) -> VisionTransformerSAM:
    """The model of the recorded weights, sizes read off the metadata."""
    tensors, meta = read(case.file)
    config = meta["config"]

    def number(name: str) -> int:
        return int(re.search(rf"{name} (\d+)", config).group(1))

    model = VisionTransformerSAM(
        img_size=number("img"),
        patch_size=number("patch"),
        embed_dim=number("dim"),
        depth=number("depth"),
        num_heads=number("heads"),
        mlp_ratio=number("mlp_ratio"),
        window_size=number("window"),
        global_attn_indexes=tuple(int(i) for i in re.search(r"blocks ([\d and]+),", config).group(1).split(" and ")),
        use_rel_pos="rel_pos" in config,
        neck_chans=number("out_chans"),
        norm_layer=lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=1e-6, **kwargs),
        num_classes=0,
    )
    weights = {k[len("weights/") :]: v for k, v in tensors.items() if k.startswith("weights/")}
    model.load_state_dict({k.replace("mlp.lin", "mlp.fc"): v for k, v in weights.items()})
    return model.eval()


def images(case: Case, batch: int) -> torch.Tensor:
    side = micro_model(case).patch_embed.img_size
    return F.interpolate(case.input(batch), size=side, mode="nearest")


@cases("expedit_sam", lambda c: c.has("out") and not c.has("block_maps"))
def test_plain(case: Case):
    with torch.no_grad():
        close(micro_model(case).forward_features(images(case, len(case["out"]))), case["out"])


@cases("expedit_sam", lambda c: c.has("block_maps"))
def test_windows(case: Case):
    s = case.settings
    check_settings(s, "loc", "n", "it", "T", "win", "k")
    model, x = micro_model(case), images(case, len(case["out"]))
    side = round(s["n"] ** 0.5)
    grouped = {"method": "cluster", "layers": s["loc"], "where": "before", "grid": side, "iterations": s["it"]}
    grouped |= {"temperature": s["T"], "window": s["win"]}
    tokenzoo.patch_model(model, [grouped, {"method": "reconstruct", "k": s["k"], "norm": "l2"}])
    with torch.no_grad():
        states = list(model.walk(x))
        close(model.forward_features(x), case["out"])
    close(states[-1].x, case["before_neck"])
    # the released last block leaves the shrunken map, ours the full one
    shapes = [list(state.x.shape[1:3]) for state in states[1:-1]]
    assert shapes == case["block_maps"].tolist()[:-1]
    assert [row.tokens_out for row in tokenzoo.report(model).rows[1:-2]] == [h * w for h, w in shapes]
