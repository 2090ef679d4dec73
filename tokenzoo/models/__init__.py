"""Backbones that timm lacks, registered with timm: `timm.create_model("svit_small")` works after `import tokenzoo`."""

from .lv_vit import LVViT
from .svit import SViT
from .t2t_vit import T2TViT

__all__ = ["LVViT", "SViT", "T2TViT"]
