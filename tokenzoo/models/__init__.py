"""Backbones that timm lacks, registered with timm: `timm.create_model("svit_small")` works after `import tokenzoo`."""

import timm

from .catanet import CATANetSR
from .lookupvit import LookupViT
from .lv_vit import LVViT
from .plain_mamba.model import PlainMamba
from .stvit import sizes as stvit_sizes
from .stvit.model import STViTR
from .svit.model import SViT
from .t2t_vit import T2TViT
from .vim import sizes as vim_sizes
from .vim.model import VisionMamba


def list_models() -> dict[str, str]:
    """Names that `timm.create_model` knows from here, in order, each with the first sentence of its docstring."""
    found = {name: timm.model_entrypoint(name) for name in timm.list_models()}
    own = {name: make for name, make in found.items() if make.__module__.startswith(f"{__name__}.")}
    return {name: (make.__doc__ or "").split("\n\n")[0].strip() for name, make in own.items()}


__all__ = [
    "CATANetSR",
    "LVViT",
    "LookupViT",
    "PlainMamba",
    "STViTR",
    "SViT",
    "T2TViT",
    "VisionMamba",
    "list_models",
    "stvit_sizes",
    "vim_sizes",
]
