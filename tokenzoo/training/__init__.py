"""What methods bring into training: losses and schedules."""

from .consistency import token_consistency
from .token_label import TokenLabelLoss

__all__ = ["TokenLabelLoss", "token_consistency"]
