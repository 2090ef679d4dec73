"""How much to remove in which block: what a schedule is, counts and rates per layer, keep rates over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .step import Step
from .tokens import Layout


def removed_per_layer(r: int | Sequence[int] | tuple[int, float] | Mapping[str, float], depth: int) -> list[int]:
    """Tokens to remove in every block, in the forms of ToMe (Bolya et al., ICLR 2023).

    Args:
        r: an int for all blocks; a list with one entry a block, missing ones are 0; or (r, slope) with slope in
            [-1, 1], also written {"r": r, "slope": slope}: a line from r * (1 - slope) at the first block to
            r * (1 + slope) at the last, (r, -1.0) being the decreasing schedule from 2r to 0.
        depth: number of blocks the counts are for.

    Raises:
        ValueError: more entries than blocks, a negative count, or a slope outside [-1, 1].
        TypeError: another form.
    """
    if isinstance(r, Mapping):
        if set(r) != {"r", "slope"}:
            raise ValueError(f"r={dict(r)}: a mapping needs exactly the keys 'r' and 'slope'")
        r = (r["r"], float(r["slope"]))
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        mean, slope = r
        if not -1 <= slope <= 1:
            raise ValueError(f"r={r}: the slope must lie in [-1, 1]")
        low = int(mean * (1 - slope))
        step = (2 * mean - 2 * low) / (depth - 1) if depth > 1 else 0.0
        counts = [int(low + step * i) for i in range(depth)]
    elif isinstance(r, int) and not isinstance(r, bool):
        counts = [r] * depth
    elif isinstance(r, Sequence) and not isinstance(r, str) and all(type(i) is int for i in r):
        if len(r) > depth:
            raise ValueError(f"r has {len(r)} entries for {depth} blocks; give at most one a block")
        counts = [*r, *([0] * (depth - len(r)))]
    else:
        raise TypeError(f"r={r!r}: give an int, a list of ints, or (r, slope) with a float slope")
    if any(c < 0 for c in counts):
        raise ValueError(f"r={r!r} asks for a negative number of tokens to remove")
    return counts


def spread(value: Any, layers: Sequence[int], what: str) -> dict[int, Any]:
    """One value a layer: a scalar is repeated, a sequence must have one entry a layer.

    Args:
        value: scalar or sequence.
        layers: block indices.
        what: the option's name, for the error.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(layers):
            raise ValueError(f"{what} has {len(value)} entries for {len(layers)} layers {tuple(layers)}; give one each")
        return dict(zip(layers, value))
    return {layer: value for layer in layers}


def keep_count(rate: float, n: int) -> int:
    """ceil(rate * n) of the double product, the rounding of EViT (Liang et al., ICLR 2022)."""
    return math.ceil(rate * n)


def cosine_keep_rate(iteration: int, epoch: int, steps_per_epoch: int, start: int, length: int, target: float) -> float:
    """Keep rate during training: 1 until `start`, a half cosine down to `target`, then `target` (EViT, ICLR 2022).

    Args:
        iteration: global step.
        epoch: epoch of that step.
        steps_per_epoch: steps in an epoch.
        start: first epoch that reduces.
        length: epochs of the descent.
        target: final keep rate.
    """
    if epoch < start:
        return 1.0
    if epoch >= start + length:
        return target
    progress = (iteration - steps_per_epoch * start) / (steps_per_epoch * length)
    return target + (1 - target) * 0.5 * (1 + math.cos(math.pi * progress))


def even_removal(t: float, capacity: int, blocks: int) -> list[int]:
    """Counts for a relative strength: the same number a block, the rest spread over the first blocks.

    Args:
        t: 0 to 1, share of `capacity`.
        capacity: most tokens one block may remove.
        blocks: number of blocks.
    """
    total = round(t * capacity * blocks)
    return [total // blocks + (i < total % blocks) for i in range(blocks)]


@dataclass(frozen=True)
class Schedule:
    """How the options of a method become one strength per block, and how many tokens that leaves.

    The base declares nothing: a method with this one defines `strengths`, `tokens_out` and `dial` itself.

    Args:
        layers: blocks to act in by default, of a depth; all for None.
        layer_names: names that `layers` may be besides indices, for places outside of the blocks.
    """

    layers: Callable[[int], Sequence[int]] | None = None
    layer_names: tuple[str, ...] = ()

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks to act in when the user names none."""
        return tuple(range(depth) if self.layers is None else self.layers(depth))

    def parse(self, method: Any) -> dict[str, Any]:
        """Checks the options and gives them one form each.

        Raises:
            TypeError, ValueError: with the method, the option and the remedy.
        """
        return {}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Any]:
        """Strength of every block that reduces."""
        raise NotImplementedError(f"{type(method).__name__} does not say how strong it is: define strengths(depth)")

    def count(self, n: int, step: Step, layout: Layout) -> Any:
        """What the strength comes to for n tokens, prefix included; unchecked."""
        return None

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens that are left of n, prefix included; raises `step.error` for strengths that cannot be reached."""
        raise NotImplementedError(f"{type(step.method).__name__} does not say what it leaves: define tokens_out(...)")

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        """Options at relative strength t in [0, 1]."""
        raise ValueError(f"{method.name} has no strength that flops=... could solve for; set its own options instead")


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks at one, two and three quarters of the depth (3, 6, 9 of 12)."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


@dataclass(frozen=True)
class Keep(Schedule):
    """A share of the patches to keep, or counts, at a few blocks: the options `keep_rate` and `tokens`.

    Where the method has no option `tokens`, rates alone say it.

    Args:
        rounding: patches that a rate keeps of n.
        lowest: patches that are left at least when `flops=` asks for as few as possible.
    """

    layers: Callable[[int], Sequence[int]] | None = quarters
    rounding: Callable[[float, int], int] = keep_count
    lowest: float = 0.5

    def parse(self, method: Any) -> dict[str, Any]:
        check_rates(method)
        tokens = getattr(method, "tokens", None)
        for count in tokens if isinstance(tokens, (tuple, list)) else (tokens,):
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{method.name}: tokens={count!r}; give the number of patches to keep, at least 1")
        return {}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, tuple[float, int | None]]:
        rates = spread(method.keep_rate, layers, f"{method.name}: keep_rate")
        counts = spread(getattr(method, "tokens", None), layers, f"{method.name}: tokens")
        both = {i: (rates[i], counts[i]) for i in layers}
        return {i: (rate, count) for i, (rate, count) in both.items() if count is not None or rate < 1}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain."""
        rate, count = step.strength
        return self.rounding(rate, n - layout.num_prefix) if count is None else count

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + kept_patches(n, step, layout)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        counts = {"tokens": None} if "tokens" in method.options() else {}
        return {"keep_rate": 1 - t * (1 - self.lowest / layout.num_patches), **counts}


def check_rates(method: Any) -> None:
    """Refuses an option `keep_rate` that is neither a share nor shares."""
    for rate in method.keep_rate if isinstance(method.keep_rate, (tuple, list)) else (method.keep_rate,):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"{method.name}: keep_rate={method.keep_rate!r}; give a number in (0, 1] or one per layer")
        if not 0 < rate <= 1:
            raise ValueError(f"{method.name}: keep_rate={rate} is outside (0, 1]; 0.7 keeps 70 % of the patches")


def kept_patches(n: int, step: Step, layout: Layout) -> int:
    """Patches that remain of n tokens, prefix included, under a schedule that keeps; checked."""
    kept, patches = step.count(n, layout), n - layout.num_prefix
    if kept > patches:
        raise step.error(f"tokens={kept} cannot be kept of {patches} patches; lower it or use keep_rate")
    return kept


def kept_of(step: Step, layout: Layout) -> Callable[[int], int]:
    """The rule of one block: patches that remain of n patches."""
    return lambda n: step.count(layout.num_prefix + n, layout)


def half_of(method: Any, n: int, num_prefix: int) -> int:
    """Every second patch."""
    return (n - num_prefix) // 2


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
        return int((n - layout.num_prefix) * step.strength) if isinstance(step.strength, float) else step.strength

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        asked, limit = step.count(n, layout), half_of if isinstance(step.strength, float) else self.limit
        most, clip = limit(step.method, n, layout.num_prefix), getattr(step.method, "clip", None)
        if asked > most and not clip:
            remedy = "" if clip is None else ", or set clip=True to merge what is possible"
            raise step.error(
                f"r={step.strength} cannot be reached, at most {most} of {n} tokens can merge{self.why(step.method)}; "
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

    def count(self, n: int, step: Step, layout: Layout) -> int:
        return self._of(step.method).count(n, step, layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return self._of(step.method).tokens_out(n, step, layout)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        return self._of(method).dial(method, t, layers, layout)
