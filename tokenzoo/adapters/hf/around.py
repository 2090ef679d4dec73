"""Models around a tower that pool its tokens by a plain mean."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..features import Reads
from .naming import PlainName


class ReadsMean(PlainName):
    """Mixin of classifiers that take a mean of the tower's `last_hidden_state`.

    The tower is told so: it gives a tensor of which a plain mean is that of the tokens by size and without padding, see
    `tokenzoo.adapters.features`. Upstream's own `forward` runs on that, its losses and outputs included.
    """

    tokenzoo_reads = Reads(mean=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = _telling(cls.__bases__[-1].forward)

    @property
    def loss_function(self) -> Any:
        """Upstream's, which is given the options of the call and knows nothing of ours."""
        plain = super().loss_function

        def loss(*args: Any, tokenzoo_reads: Any = None, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        return loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value


def _telling(plain: Any) -> Any:
    """A `forward` of the same signature, which trainers look at, that hands on what the model reads."""

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, tokenzoo_reads=self.tokenzoo_reads, **kwargs)

    return forward
