"""Which method for a model: a search over methods and schedules on the user's own images."""

from .advise import tune
from .outcome import Row, Tuning

__all__ = ["Row", "Tuning", "tune"]
