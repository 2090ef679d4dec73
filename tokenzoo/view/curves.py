"""Curves of a comparison: one line per method, named at its end; two panels where one method would rule the axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANY = 12  # lines that one panel holds
APART = 2.5  # times that the values of all may span those of the better half
_COLORS = ("#1f5fa8", "#c2410c", "#15803d", "#b91c1c", "#6d28d9", "#7c4a2d", "#be185d", "#4b5563", "#807a00", "#0e7490")
_STYLES = ("-", "--", ":", "-.")
_MARKS = "osD^vPX<>hp*"
_LINE = 11.0  # points that a name needs
_HALVES = ("the upper half of the methods", "the lower half, on an axis of its own")


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    x: str = "gmacs",
    y: str = "top1",
    error: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str = "",
) -> None:
    """Draws one curve a method, with error bars and its name, and the unpatched model as a star with a line through it.

    Names stand on the side that most of the runs are on, seen from the unpatched model: with the strongest ones. Where
    there are many methods, or some are far below the others, the upper half gets a panel with an axis of its own, and
    the lower half another.

    Args:
        rows: one mapping a run with `method` ("unpatched" for none) and the columns named; rows whose x or y is
            missing or None are left out.
        path: picture to write; the suffix decides the format.
        x: column across, for instance gmacs or infer_samples_per_sec.
        y: column upwards, for instance top1.
        error: column of the half length of the error bars; by default `y` + "_se" where there is one.
        xlabel: text for x; the column's name by default.
        ylabel: text for y.
        title: line above.

    Raises:
        ValueError: no row has both columns.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("curves need matplotlib; pip install 'tokenzoo[plot]'") from missing
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not rows:
        raise ValueError(f"no row has both {x!r} and {y!r}: there is no curve to draw")
    error = f"{y}_se" if error is None else error
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        if row["method"] != "unpatched":
            curves.setdefault(row["method"], []).append(row)
    base = [row for row in rows if row["method"] == "unpatched"]
    groups = halves({name: [row[y] for row in own] for name, own in curves.items()}, [row[y] for row in base])
    longest = max(map(len, groups))
    size = (7.2 if len(groups) == 1 else 12.0, max(4.6, longest * _LINE * 1.25 / 72))  # inches
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    names = (row["method"] for row in rows if row["method"] != "unpatched")
    styles = {name: number for number, name in enumerate(dict.fromkeys(names))}  # the same in figures of other columns
    left = not base or 2 * sum(row[x] < base[0][x] for own in curves.values() for row in own) >= len(rows) - len(base)
    for place, group in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), place + 1)
        _panel(axes, {name: curves[name] for name in group}, base, styles, (x, y, error), left)
        axes.set_xlabel(xlabel or x)
        axes.set_ylabel((ylabel or y) if place == 0 else "")
        if len(groups) > 1:
            axes.set_title(_HALVES[place], fontsize=10)
        else:
            axes.set_title(title, fontsize=10)
    if len(groups) > 1:
        figure.suptitle(title, fontsize=11)
    figure.draw_without_rendering()  # names find their places once axes have theirs
    for axes, group in zip(figure.axes, groups):
        _names(axes, {name: curves[name][0 if left else -1] for name in group}, styles, (x, y), left)
    figure.savefig(path, dpi=150)


def halves(values: Mapping[str, Sequence[float]], base: Sequence[float] = ()) -> list[list[str]]:
    """The methods of every panel: all in one, or the upper and the lower half by their lowest value.

    Args:
        values: of every method.
        base: of the unpatched model, which every panel shows.
    """
    names = sorted(values, key=lambda name: -min(values[name]))
    upper = names[: (len(names) + 1) // 2]

    def span(group: Sequence[str]) -> float:
        shown = [*base, *(value for name in group for value in values[name])]
        return max(shown) - min(shown)

    few = len(names) <= MANY and (len(names) < 3 or span(names) <= APART * span(upper))
    return [list(values)] if few else [upper, names[len(upper) :]]


def _panel(
    axes: Any,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    base: Sequence[Mapping[str, Any]],
    styles: Mapping[str, int],
    columns: tuple[str, str, str],
    left: bool,
) -> None:
    x, y, error = columns
    for name, own in curves.items():
        number = styles[name]
        axes.errorbar(
            [row[x] for row in own],
            [row[y] for row in own],
            yerr=[row.get(error) or 0.0 for row in own],
            color=_COLORS[number % len(_COLORS)],
            linestyle=_STYLES[number // len(_COLORS) % len(_STYLES)],
            marker=_MARKS[number % len(_MARKS)],
            markersize=4.5,
            linewidth=1.3,
            elinewidth=0.7,
            capsize=2,
            label=name,
        )
    for row in base:
        axes.axhline(row[y], color="0.6", linewidth=0.9, linestyle="--", zorder=0)
        axes.errorbar(
            row[x], row[y], yerr=row.get(error) or 0.0, color="black", marker="*", markersize=12, capsize=2.5,
            linestyle="none", label="unpatched",
        )  # fmt: skip
        axes.annotate(
            "unpatched", (row[x], row[y]), (0, 8), textcoords="offset points", ha="right" if left else "left",
            fontsize=8.5,
        )  # fmt: skip
    low, high = axes.get_xlim()
    room = 0.28 * (high - low)  # for the names
    axes.set_xlim(*((low - room, high) if left else (low, high + room)))
    axes.margins(y=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _names(
    axes: Any, ends: Mapping[str, Mapping[str, Any]], styles: Mapping[str, int], columns: tuple[str, str], left: bool
) -> None:
    """Writes every name beside its line, as high as the line ends or as near to it as the others let it."""
    x, y = columns
    box = axes.get_window_extent()
    points = axes.figure.dpi / 72
    order = sorted(ends, key=lambda name: ends[name][y])
    wanted = [axes.transData.transform((ends[name][x], ends[name][y]))[1] for name in order]
    step = min(_LINE * points, (box.height - 4 * points) / max(1, len(order) - 1))
    heights = spread(wanted, step, box.y0 + 2 * points, box.y1 - 2 * points)
    for name, height in zip(order, heights):
        color = _COLORS[styles[name] % len(_COLORS)]
        end = (ends[name][x], ends[name][y])
        place = (0.015 if left else 0.985, (height - box.y0) / box.height)
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.55, "shrinkB": 3}
        axes.annotate(
            name, end, place, textcoords="axes fraction", va="center", ha="left" if left else "right", fontsize=8.5,
            color=color, arrowprops=leader, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places at least a step apart, each as near as that allows to where it is wanted.

    Args:
        wanted: places, rising.
        step: between neighbours.
        low: the lowest place.
        high: the highest.
    """
    # blocks of neighbours that touch; each lies where the mean of its wishes is
    blocks: list[tuple[float, int]] = []  # sum of the wishes for the first place of the block, and how many
    for place in wanted:
        total, count = place, 1
        while blocks and _start(*blocks[-1], step, low, high) + blocks[-1][1] * step > _start(
            total, count, step, low, high
        ):
            before, many = blocks.pop()
            total, count = before + total - count * many * step, many + count
        blocks.append((total, count))
    return [_start(total, count, step, low, high) + k * step for total, count in blocks for k in range(count)]


def _start(total: float, count: int, step: float, low: float, high: float) -> float:
    return max(low, min(total / count, high - (count - 1) * step))
