"""The found recipes over what they cost."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.plots import require_matplotlib
from .outcome import Tuning

_MARKERS = {"unpatched": "s", "winner": "*", "default": "D", "finalist": "o", "weaker": "o"}
_COLOURS = {"unpatched": "0.3", "winner": "C3", "default": "C0", "finalist": "0.6", "weaker": "C3"}


def plot_tuning(found: Tuning, path: str | Path, title: str = "") -> None:
    """Held-out figures with one standard error, over the share of time or of multiply-adds.

    Args:
        found: from `tokenzoo.tune`.
        path: PNG to write.
        title: what was measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = any(row.time is not None for row in found.rows)
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    front = sorted((100 * row.cost, row.value.mean) for row in found.rows if row.role in ("weaker", "winner"))
    axes.plot(*zip(*front), color="C3", linewidth=1, alpha=0.5, zorder=1)
    for row in found.rows:
        axes.errorbar(
            100 * row.cost,
            row.value.mean,
            yerr=row.value.se,
            marker=_MARKERS[row.role],
            markersize=12 if row.role == "winner" else 6,
            color=_COLOURS[row.role],
            linestyle="",
            capsize=3,
            label=row.label if row.role in ("unpatched", "weaker") else f"{row.label} ({row.role})",
        )
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles)))  # of several with one name
    axes.legend(list(first.values())[::-1], list(first)[::-1], fontsize=8)
    axes.set_xlabel(f"% of the unpatched model's {'time' if timed else 'multiply-adds'}")
    axes.set_ylabel({"-KL": "-KL to the unpatched model", "cosine": "cosine with the unpatched model"}.get(
        found.title, found.title
    ))  # fmt: skip
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
