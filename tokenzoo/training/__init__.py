"""What methods bring into training: losses and schedules."""

from .consistency import token_consistency

__all__ = ["token_consistency"]
