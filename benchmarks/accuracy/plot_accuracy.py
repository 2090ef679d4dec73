"""Draws the CSV files of accuracy_curves.py.

    python benchmarks/accuracy/plot_accuracy.py benchmarks/accuracy/*_free.csv benchmarks/accuracy/*_tuned.csv

A file of methods off the shelf becomes curves of accuracy over multiply-adds, a file of fine-tuned models a column a
method with its accuracy before and after. Pictures lie beside their file, NAME.csv gives NAME.png.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from tokenzoo.view.maps import plot_curves

NUMBERS = ("top1", "gmacs", "diff_se", "share", "free_top1", "diff_free_se")


def plot(path: Path) -> None:
    """Draws one file."""
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["top1"]]  # others are out of reach
    for row in rows:
        row |= {key: float(row[key]) for key in NUMBERS if row.get(key)}
    data, _, kind = path.stem.rpartition("_")
    ylabel = f"top-1 of {rows[0]['images']} pictures, percent"
    if kind == "tuned":
        _before_and_after(rows, path.with_suffix(".png"), data, ylabel)
        return
    plot_curves(
        rows, path.with_suffix(".png"), error="diff_se", xlabel="GMACs per image", ylabel=ylabel,
        title=f"{data}: methods off the shelf (bars: error of the paired difference)",
    )  # fmt: skip


def _before_and_after(rows: list[dict[str, Any]], path: Path, data: str, ylabel: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, control, *methods = rows
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(base["top1"], color="0.5", linestyle="--", linewidth=1, label="unpatched, as it was")
    axes.axhline(control["top1"], color="black", linestyle="-", linewidth=1, label="unpatched, fine-tuned likewise")
    for place, row in enumerate(methods):
        before, after = (place, row["free_top1"]), (place, row["top1"])
        axes.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": "0.6"})
        axes.plot(*before, "o", color="tab:blue", fillstyle="none", label=None if place else "off the shelf")
        axes.errorbar(
            *after, yerr=row["diff_free_se"], fmt="o", color="tab:blue", capsize=3,
            label=None if place else "fine-tuned (bar: error of the\ndifference to off the shelf)",
        )  # fmt: skip
    axes.set_xticks(range(len(methods)), [f"{row['method']}\n{row['share']:.0%}" for row in methods])
    axes.set_xlabel("share of the unpatched multiply-adds")
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylabel(ylabel)
    axes.set_title(f"{data}: the same budget of fine-tuning for all", fontsize=10)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(Path(name))
