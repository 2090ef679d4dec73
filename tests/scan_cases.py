"""Tiny models that scan their tokens, and the table of the methods that serve them: one row per method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenzoo.models import PlainMamba, VisionMamba

# method -> (options that remove nothing, options that reduce, options of a static shape where they differ)
SCAN_ZOO: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "famba": ({"r": 0}, {"r": 3}, {}),
    "mtr": ({"r": 0}, {"r": 4, "layers": (0, 1)}, {}),
    "pool": ({"stride": 1}, {"stride": 2}, {}),
    "random": ({"keep_rate": 1.0}, {"keep_rate": 0.6, "layers": (0, 1)}, {}),
    "rmeeto": ({"r": 0}, {"r": 3, "interval": 1}, {}),
    "ssm_prune": ({"keep_rate": 1.0}, {"keep_rate": 0.6, "layers": (0, 1)}, {}),
    "tome": ({"r": 0}, {"r": 3}, {}),
    "uniform": ({"keep_rate": 1.0}, {"keep_rate": 0.6, "layers": (0, 1)}, {}),
}
SCAN_METHODS = sorted(SCAN_ZOO)
# methods that only make sense after another one, and those after which all tokens are there again
SCAN_COMPANION: dict[str, str] = {}
SCAN_KEEPS_LENGTH: set[str] = set()


def given(method: str, kind: str = "reduce", **more: Any) -> Any:
    """The recipe of a row.

    Args:
        method: name of the method.
        kind: "zero", "reduce" or "static".
        more: options of the method on top.
    """
    zero, reduce, static = SCAN_ZOO[method]
    options = {"zero": zero, "reduce": reduce, "static": {**reduce, **static}}[kind]
    recipe = {"method": method, **options, **more}
    return [given(SCAN_COMPANION[method], kind), recipe] if method in SCAN_COMPANION else recipe


VIM = partial(VisionMamba, img_size=32, patch_size=8, embed_dim=24, depth=3, d_state=4, num_classes=5)
PLAIN = partial(PlainMamba, img_size=32, patch_size=8, embed_dim=24, depth=3, d_state=4, conv_size=3, num_classes=5)

# name -> model; everything that differs in how tokens run through it
SCANNERS: dict[str, Callable[[], nn.Module]] = {
    "vim": VIM,
    "vim_first": partial(VIM, cls_position="first"),
    "vim_both": partial(VIM, cls_position="both"),
    "vim_none": partial(VIM, cls_position="none"),
    "vim_gap": partial(VIM, global_pool="avg"),
    "vim_no_pool": partial(VIM, global_pool="", num_classes=0),
    "vim_v1": partial(VIM, bimamba_type="v1"),
    "vim_forward": partial(VIM, bimamba_type="none"),
    "vim_sum": partial(VIM, if_divide_out=False),
    "vim_stride": partial(VIM, stride=6),  # 5 x 5 patches: the class token has no middle
    "vim_odd": partial(VIM, img_size=(24, 40), drop_path_rate=0.2),
    "vim_dynamic": partial(VIM, dynamic_img_size=True),
    "plain_mamba": PLAIN,
    "plain_mamba_depthwise": partial(PLAIN, depthwise_layers=(0,)),
    "plain_mamba_late_depthwise": partial(PLAIN, depthwise_layers=(2,), drop_path_rate=0.2, stem_convs=2),
    "plain_mamba_odd": partial(PLAIN, img_size=(27, 45), depthwise_layers=(1,)),
    "plain_mamba_no_pool": partial(PLAIN, global_pool=""),
    "plain_mamba_taps": partial(PLAIN, tap_norms=(0, 1)),
}
CORE = ("vim", "plain_mamba_depthwise")  # one of each family, for what hardly depends on the options


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with random weights in which mistakes show."""
    torch.manual_seed(seed)
    return shaken(SCANNERS[name]())


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Random weights: norms, positions and running statistics off their start, steps long enough to matter."""
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        if last in ("A_log", "A_b_log"):
            parameter.uniform_(-1, 1)
        elif last in ("D", "D_b") or ("norm" in name and last == "weight") or name == "ln1.weight":
            parameter.uniform_(0.5, 1.5)
        elif "dt_proj" in name and last == "bias":
            parameter.uniform_(-2, 0.5)
        elif last == "bias" or "token" in name or last in ("pos_embed", "direction_Bs"):
            parameter.normal_(std=0.3)
        else:
            parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images of the model's size."""
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def total(model: nn.Module) -> int:
    """Tokens in front of block 0, prefix included."""
    return model.num_prefix_tokens + model.patch_embed.num_patches
