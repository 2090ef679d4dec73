"""What a method may look at in a block that scans its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..maps import TokenMap


class MixerSignals:
    """View of one scanning block, kept in step with the tokens when several maps follow each other.

    All values list tokens as `Tokens` does, prefix in front, whatever the order of the scan.

    Args:
        training: whether the block is in training mode.
        normed: what the mixer reads, behind the norm [B, N, C]; None in front of it.
        hidden: output of the mixer [B, N, C]; None before it has run.
        scan: the mixer's `ScanSignals`, None where no method of the block reads them.
        to_tokens: takes values of the mixer [B, D, L] to the order of tokens [B, N, D].

    Attributes:
        module: the learned module that a method keeps in this block, None for methods without parameters.
    """

    def __init__(
        self,
        training: bool,
        normed: Tensor | None = None,
        hidden: Tensor | None = None,
        scan: Any = None,
        to_tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.training, self._normed, self._hidden, self._scan, self._to_tokens = (
            training, normed, hidden, scan, to_tokens,
        )  # fmt: skip
        self._maps: tuple[TokenMap, ...] = ()
        self.module: nn.Module | None = None

    def after(self, token_map: TokenMap) -> MixerSignals:
        """The same signals for the tokens that a map leaves."""
        other = MixerSignals(self.training, self._normed, self._hidden, self._scan, self._to_tokens)
        other._maps = (*self._maps, token_map)
        return other

    def with_module(self, module: nn.Module | None) -> MixerSignals:
        """The same signals with another learned module."""
        self.module = module
        return self

    def _mapped(self, values: Tensor | None, what: str) -> Tensor:
        if values is None:
            raise ValueError(f"{what} is not known at this place of a scanning block")
        for token_map in self._maps:
            values = token_map.apply(values)
        return values

    @property
    def normed(self) -> Tensor:
        """What the mixer reads [B, N, C]."""
        return self._mapped(self._normed, "what the mixer reads")

    @property
    def hidden(self) -> Tensor:
        """Output of the mixer [B, N, C]."""
        return self._mapped(self._hidden, "the output of the mixer")

    @property
    def metric(self) -> Tensor:
        """What tokens are alike by: the output of the mixer [B, N, C]."""
        return self.hidden

    @property
    def directions(self) -> int:
        """Directions of the scan."""
        return len(self._scan.y)

    def scanned(self, name: str, direction: int) -> Tensor:
        """A value of the scan in one direction [B, N, D].

        Args:
            name: "y" (output before the gate, skip included), "delta" (step sizes), "raw_delta" (before bias and
                softplus), "B", "C".
            direction: 0 is forward.
        """
        return self._mapped(self._to_tokens(getattr(self._scan, name)[direction]), name)

    @property
    def step_size(self) -> Tensor:
        """Step size of every token, mean over channels and sum over directions [B, N] float32; carries no gradient."""
        with torch.no_grad():
            return sum(self.scanned("delta", way).float().mean(-1) for way in range(self.directions))

    @property
    def gate(self) -> Tensor:
        """Gate that all directions share [B, N, D]."""
        return self._mapped(self._to_tokens(self._scan.gate), "the gate")
