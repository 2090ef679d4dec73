"""PlainMamba (Yang et al., BMVC 2024)."""

from .model import PlainMamba

__all__ = ["PlainMamba"]
