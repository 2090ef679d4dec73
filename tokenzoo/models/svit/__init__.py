"""SViT (Huang et al., CVPR 2023)."""

from .model import SViT

__all__ = ["SViT"]
