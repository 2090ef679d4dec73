"""Numbers of patches to remove per block, and methods that take either numbers or shares to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout
from .base import Schedule
from .keep import Keep
from .per_layer import even_removal, removed_per_layer, spread


def half_of(method: Any, n: int, num_prefix: int) -> int:
    """Every second patch."""
    return (n - num_prefix) // 2


def _asked(step: Step) -> int | float:
    """r of a step; a method that keeps more per block has it in front."""
    return step.strength[0] if isinstance(step.strength, tuple) else step.strength


@dataclass(frozen=True)
class Remove(Schedule):
    """A number of patches to remove per block: the options `r` (in ToMe's forms) and, where there is one, `clip`.

    Args:
        default: what r is where the option is None.
        limit: patches that can go at most, of a method, n tokens and their prefix.
        why: the limit in words, of a method, for the message.
        shares: r may be a share of the patches below 1, which half of them alone limits.
    """

    default: int = 0
    limit: Callable[[Any, int, int], int] = half_of
    why: Callable[[Any], str] = lambda method: ""
    shares: bool = False

    def parse(self, method: Any) -> dict[str, Any]:
        r = method.r
        if isinstance(r, tuple) and len(r) == 2 and type(r[0]) is int and isinstance(r[1], float):
            r = {"r": r[0], "slope": r[1]}
        if self.shares and isinstance(r, float):
            if not 0 <= r < 1:
                raise ValueError(f"{method.name}: r={r}; a share must lie in [0, 1), a count must be a whole number")
        elif r is not None:
            removed_per_layer(r, 1000)  # reports a form or sign that is not understood
        return {"r": r}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, int | float]:
        if self.shares and isinstance(method.r, float):
            return spread(method.r, layers, f"{method.name}: r") if method.r > 0 else {}
        counts = removed_per_layer(self.default if method.r is None else method.r, len(layers))
        return {i: r for i, r in zip(layers, counts) if r > 0}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that the strength asks to remove."""
        r = _asked(step)
        return int((n - layout.num_prefix) * r) if isinstance(r, float) else r

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        asked, limit = step.count(n, layout), half_of if isinstance(_asked(step), float) else self.limit
        most, clip = limit(step.method, n, layout.num_prefix), getattr(step.method, "clip", None)
        if asked > most and not clip:
            remedy = "" if clip is None else ", or set clip=True to merge what is possible"
            raise step.error(
                f"r={_asked(step)} cannot be reached, at most {most} of {n} tokens can merge{self.why(step.method)}; "
                f"lower r, give a list with one r per block{remedy}"
            )
        return n - min(asked, most)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        prefix = layout.num_prefix
        n, counts = prefix + layout.num_patches, []
        for r in even_removal(t, min(layout.num_patches - 1, self.capacity(layout.num_patches)), len(layers)):
            counts.append(min(r, self.limit(method, n, prefix)))
            n -= counts[-1]
        return {"r": tuple(counts)}

    def capacity(self, patches: int) -> int:
        """Patches that one block could remove, for the dial."""
        return patches // 2


@dataclass(frozen=True)
class RemoveAll(Remove):
    """The same where all patches but one can go."""

    limit: Callable[[Any, int, int], int] = lambda method, n, num_prefix: n - num_prefix - 1

    def capacity(self, patches: int) -> int:
        return patches - 1


@dataclass(frozen=True)
class Either(Schedule):
    """Shares to keep where the option `keep_rate` is given, else numbers to remove.

    Args:
        keep: for shares.
        remove: for numbers.
    """

    keep: Keep = Keep()
    remove: Remove = Remove()

    def _of(self, method: Any) -> Schedule:
        return self.remove if method.keep_rate is None else self.keep

    def parse(self, method: Any) -> dict[str, Any]:
        if method.r is not None and method.keep_rate is not None:
            raise ValueError(
                f"{method.name}: r={method.r} and keep_rate={method.keep_rate} both say how much to remove; give one"
            )
        return self._of(method).parse(method)

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Any]:
        return self._of(method).strengths(method, layers)

    def _for(self, step: Step) -> Schedule:
        return self.keep if isinstance(step.strength, tuple) else self.remove

    def count(self, n: int, step: Step, layout: Layout) -> int:
        return self._for(step).count(n, step, layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return self._for(step).tokens_out(n, step, layout)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        return self._of(method).dial(method, t, layers, layout)
