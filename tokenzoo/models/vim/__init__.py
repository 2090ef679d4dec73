"""Vision Mamba (Zhu et al., ICML 2024)."""

from .model import VisionMamba

__all__ = ["VisionMamba"]
