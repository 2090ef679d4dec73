"""Models that are patched as a whole, by a room of their own, through the same calls as backbones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from .registry import meet

_WHOLES: list[Whole] = []


class Whole(ABC):
    """What `patch_model`, `unpatch_model`, `report` and `is_patched` hand such a model to.

    A patched one carries its recipe as `tokenzoo_recipe`, with `to_dict()`.

    Attributes:
        name: of the kind of model.
    """

    name: str = ""

    @abstractmethod
    def serves(self, model: nn.Module) -> bool:
        """Whether a model, patched or not, is of this kind."""

    @abstractmethod
    def patch(self, model: nn.Module, method: Any, **options: Any) -> nn.Module:
        """Puts a recipe on, in place."""

    @abstractmethod
    def unpatch(self, model: nn.Module) -> nn.Module:
        """Takes it off again."""

    @abstractmethod
    def report(self, model: nn.Module, **options: Any) -> Any:
        """What the model costs, part by part."""


def register_whole(whole: Whole) -> None:
    """Adds a kind of model."""
    _WHOLES.append(whole)


def whole_of(model: nn.Module) -> Whole | None:
    """The kind of a model that is patched as a whole; None for all others."""
    meet(type(model))
    return next((whole for whole in _WHOLES if whole.serves(model)), None)
