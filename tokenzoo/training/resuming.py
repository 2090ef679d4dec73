"""Whether a run may go on from a checkpoint: the same recipe, and the same of all that the weights depend on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..core.method import plain
from ..core.registry import list_methods, method_class
from .options import FREE, build_parser, flag

_IN_RECIPE = frozenset({"method", "method_kwargs", "flops"})


def settings_of(args: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """What the weights depend on besides the recipe, as plain values.

    Args:
        args: options of the run.
        facts: what the options do not say: number of processes, of pictures, of classes.
    """
    kept = {key: value for key, value in vars(args).items() if key not in FREE | _IN_RECIPE}
    return {**{k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}, **facts}


def refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares what a checkpoint holds with the run that wants to go on from it.

    A flag that the checkpoint does not know had no effect then, as its default has none.

    Args:
        before: the checkpoint's "recipe" and "settings".
        now: the run's.

    Raises:
        ValueError: with every difference.
    """
    old, new = {**vars(build_parser().parse_args([])), **before["settings"]}, now["settings"]
    changed = [
        *differences(before["recipe"], now["recipe"], "recipe"),
        *(
            f"{flag(key)}: {old.get(key)!r} before, {new.get(key)!r} now"
            for key in sorted(set(before["settings"]) | set(new))
            if old.get(key) != new.get(key)
        ),
    ]
    if changed:
        raise ValueError(
            "the run to resume was started differently: " + "; ".join(changed) + "; give what it was started with "
            "(see args.yaml and recipe.json in its folder), or another --output"
        )


def differences(before: Any, now: Any, what: str) -> list[str]:
    """Every entry in which two recipes differ, in words; options that are not given count as their defaults."""
    before, now = _complete(before), _complete(now)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.get("method") != now.get("method") and isinstance(now.get("method"), str):
            keys = ["method"]  # options of different methods are not comparable
        else:
            keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{what}.{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and before:
        if isinstance(before[0], Mapping):
            return [line for i, pair in enumerate(zip(before, now)) for line in differences(*pair, f"{what}[{i}]")]
    return [] if before == now else [f"{what}: {before!r} before, {now!r} now"]


def _complete(recipe: Any) -> Any:
    if not isinstance(recipe, Mapping) or recipe.get("method") not in list_methods():
        return recipe
    return {**plain(method_class(recipe["method"]).options()), **recipe}
