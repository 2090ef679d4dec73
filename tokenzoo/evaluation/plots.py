"""Curves of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .throughput import Speed
from .timing import Spread


def require_matplotlib() -> None:
    """Raises ImportError with the remedy if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'tokenzoo[plot]'")


def plot_speed(results: Sequence[Speed], path: str | Path, title: str = "") -> None:
    """Speed-up against the share of multiply-adds that is left, quartiles as bars, one line per method.

    Args:
        results: from `bench`, the unpatched model first.
        path: PNG to write.
        title: what was measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    shares = sorted({1 / r.gmac_ratio for r in results} | {0.4})
    grid = [shares[0] + (1 - shares[0]) * i / 100 for i in range(101)]
    axes.plot(grid, [1 / s for s in grid], "--", color="0.6", linewidth=1, label="as multiply-adds")
    for name in dict.fromkeys(r.method for r in results):
        rows = sorted((r for r in results if r.method == name), key=lambda r: r.gmac_ratio)
        spreads = [Spread.of(r.speedups) for r in rows]
        axes.errorbar(
            [1 / r.gmac_ratio for r in rows],
            [s.median for s in spreads],
            yerr=[[s.median - s.q1 for s in spreads], [s.q3 - s.median for s in spreads]],
            marker="o",
            capsize=3,
            label=name,
        )
    axes.set_xlabel("share of the unpatched model's multiply-adds")
    axes.set_ylabel("speed-up (median and quartiles)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
