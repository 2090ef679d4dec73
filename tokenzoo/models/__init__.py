"""Backbones that timm lacks, registered with timm: `timm.create_model("svit_small")` works after `import tokenzoo`."""

from .lv_vit import LVViT
from .plain_mamba.model import PlainMamba
from .stvit.model import STViTR
from .svit.model import SViT
from .t2t_vit import T2TViT
from .vim import sizes as vim_sizes
from .vim.model import VisionMamba

__all__ = ["LVViT", "PlainMamba", "STViTR", "SViT", "T2TViT", "VisionMamba", "vim_sizes"]
