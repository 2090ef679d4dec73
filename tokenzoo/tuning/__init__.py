"""Which method for a model, and how strong in which block, on the user's own images."""

from .advise import tune
from .outcome import Row, Tuning
from .rates import LearnedRates, learn_rates

__all__ = ["LearnedRates", "Row", "Tuning", "learn_rates", "tune"]
