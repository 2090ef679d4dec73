"""Models around a tower that read more of its tokens than the pooled one."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from ..features import Reads
from .naming import PlainName


class TellsTower(PlainName):
    """Mixin of models that tell the tower what they do with its tokens, as an option of the call.

    Upstream's own `forward` runs on what the tower then gives, its losses and outputs included.
    """

    tower: str  # where the tower is
    tokenzoo_options: dict[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = cls.__bases__[-1]
        if plain.__module__.startswith("transformers."):
            cls.forward = _telling(plain.forward)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call with those for the tower."""
        return {**kwargs, **self.tokenzoo_options}

    @property
    def loss_function(self) -> Any:
        """Upstream's, which is given the options of the call and knows nothing of ours."""
        plain = super().loss_function

        def loss(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **{key: value for key, value in kwargs.items() if not key.startswith("tokenzoo_")})

        return loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value


class ReadsMean(TellsTower):
    """Mixin of classifiers that take a plain mean of the tower's `last_hidden_state` behind the class token.

    The tower gives a tensor of which that is the mean of the tokens by size and without padding, see
    `tokenzoo.adapters.features`.
    """

    tokenzoo_options = {"tokenzoo_reads": Reads(mean=True)}


class ReadsGrid(TellsTower):
    """Mixin of models that lay hidden states out on the grid: every patch reads the token it went into."""

    tokenzoo_options = {"tokenzoo_dense": True}


def _telling(plain: Any) -> Any:
    """A `forward` of the same signature, which trainers look at, that hands on what the model reads."""

    names = list(inspect.signature(plain).parameters)[1:]

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.get_submodule(self.tower), "tokenzoo_recipe"):
            return plain(self, *args, **kwargs)
        # named: what was given by place may have to be told in another way
        given = {**dict(zip(names, args)), **kwargs}
        return plain(self, **self._options(given))

    return forward
