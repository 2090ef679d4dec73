"""Training: the run of `tokenzoo train` and its parts, losses and schedules that methods bring, segmentation."""

from .consistency import token_consistency
from .losses import TrainStep, distillation
from .options import parse_options
from .run import train
from .token_distillation import token_distillation
from .token_label import TokenLabelLoss

__path__ += [f"{__path__[0]}/../kept/training"]  # where modules stood that have moved

__all__ = [
    "TokenLabelLoss",
    "TrainStep",
    "distillation",
    "parse_options",
    "token_consistency",
    "token_distillation",
    "train",
]
