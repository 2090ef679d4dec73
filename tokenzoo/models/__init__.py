"""Backbones that timm lacks, registered with timm: `timm.create_model("svit_small")` works after `import tokenzoo`."""

from . import vim_sizes
from .lv_vit import LVViT
from .plain_mamba import PlainMamba
from .svit import SViT
from .t2t_vit import T2TViT
from .vim import VisionMamba

__all__ = ["LVViT", "PlainMamba", "SViT", "T2TViT", "VisionMamba", "vim_sizes"]
