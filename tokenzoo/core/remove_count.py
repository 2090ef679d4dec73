"""What methods share that merge r pairs of tokens in some blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .method import Method, Step
from .schedule import even_removal, removed_per_layer
from .tokens import Layout


@dataclass(frozen=True, kw_only=True)
class RemoveCount(Method):
    """Base of methods that remove a number of patches in each of their blocks, at most every second one.

    Args:
        r: patches to remove a block: an int, a list with one entry a layer (missing ones 0), or (r, slope), see
            `tokenzoo.core.schedule.removed_per_layer`.
        clip: remove fewer where r exceeds half of the patches, instead of refusing.
        layers: blocks to act in.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 11
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
            r = {"r": r[0], "slope": r[1]}
        object.__setattr__(self, "r", tuple(r) if isinstance(r, list) else r)
        removed_per_layer(self.r, 1000)  # reports a form or sign that is not understood
        self._check_flags("clip")

    def _check_flags(self, *names: str) -> None:
        """Refuses switches that are neither True nor False."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{self.name}: {name}={getattr(self, name)!r}; give True or False")

    def strengths(self, depth: int) -> dict[int, int]:
        layers = self.resolve_layers(depth)
        return {i: r for i, r in zip(layers, removed_per_layer(self.r, len(layers))) if r > 0}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        most = (n - layout.num_prefix) // 2
        if step.strength > most and not self.clip:
            raise step.error(
                f"r={step.strength} cannot be reached, at most {most} of {n} tokens can merge; lower r, give a list "
                "with one r a layer, or set clip=True to merge what is possible"
            )
        return n - min(step.strength, most)

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        layers = self.resolve_layers(depth)
        left, counts = layout.num_patches, []
        for r in even_removal(t, layout.num_patches // 2, len(layers)):
            counts.append(min(r, left // 2))
            left -= counts[-1]
        return replace(self, r=tuple(counts))
