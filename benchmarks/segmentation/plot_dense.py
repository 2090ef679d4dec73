"""Draws the tables of frozen backbones, NAME.csv to NAME_HEAD.png (curves) or NAME.png (points).

    python benchmarks/segmentation/plot_dense.py benchmarks/segmentation/camvid_tiny.csv \
        benchmarks/segmentation/camvid_small14.csv benchmarks/segmentation/agreement_small14.csv
    python benchmarks/segmentation/plot_dense.py --page benchmarks/segmentation/camvid.md

The second form writes the tables of a page anew, between its lines "begin FILE" and "end". Two panels with ranges of
their own: methods that stay close to the unpatched model, and the others. Lines and points carry their names, so that
no legend has to be read.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = ("share", "time_ratio", "diff", "diff_se", "miou", "cosine", "cosine_se", "saliency_iou")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a table, its numbers as numbers."""
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    return [row | {key: float(row[key]) for key in NUMBERS if row.get(key)} for row in rows]


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Places as near to the wanted ones as a gap between neighbours allows; the order stays."""
    order = np.argsort(wanted, kind="stable")
    groups: list[list[float]] = []  # [sum of wanted minus offsets, members]: neighbours that touch move together
    for value in np.asarray(wanted, float)[order]:
        groups.append([value, 1])
        while len(groups) > 1:
            (low, m), (high, n) = groups[-2:]
            if low / m + (m - 1) * gap / 2 + gap <= high / n - (n - 1) * gap / 2:
                break
            groups[-2:] = [[low + high, m + n]]
    placed = [total / n + (i - (n - 1) / 2) * gap for total, n in groups for i in range(int(n))]
    places = np.empty(len(placed))
    places[order] = placed
    return places


def label_ends(axes: Any, ends: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence[Any]) -> None:
    """Names right of the axes, each tied to the end of its line."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    ats = spread([y for _, y in ends], (high - low) / 26)
    axes.set(xlim=(left, right), ylim=(low, high))  # names outside must not widen the axes
    at_x = right + 0.05 * (right - left)
    for (x, y), at, text, colour in zip(ends, ats, texts, colours):
        axes.plot([x, at_x], [y, at], color=colour, linewidth=0.6, alpha=0.6, clip_on=False)
        axes.text(at_x, at, f" {text}", color=colour, fontsize=8, va="center", ha="left")


def figure_of(title: str) -> tuple[Any, Any]:
    """Two panels side by side with room for names right of each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.6))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, gridspec_kw={"wspace": 0.62})
    figure.subplots_adjust(left=0.065, right=0.84, top=0.86, bottom=0.11)
    figure.suptitle(title, fontsize=11)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def colour(index: int) -> Any:
    """Ten strong colours, then their dark halves."""
    from matplotlib import colormaps

    red, green, blue, alpha = colormaps["tab10"](index % 10)
    factor = 0.55 if index // 10 % 2 else 1.0
    return (red * factor, green * factor, blue * factor, alpha)


def curves(rows: list[Row], path: Path, limit: float) -> None:
    """Loss of mIoU over the share of multiply-adds: methods that lose less than `limit` near 60 %, and others."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == "unpatched" or row["setting"].startswith("one third") or "temperature" in row["setting"]:
            continue
        named.setdefault("cluster as chosen" if "sharpness" in row["setting"] else row["method"], []).append(row)
    near_60 = {name: min(own, key=lambda row: abs(row["share"] - 0.6))["diff"] for name, own in named.items()}
    base = next(row for row in rows if row["method"] == "unpatched")
    title = (
        f"{base['weights']}, {base['size'].replace('x', ' x ')}, {base['head']} head: CamVid, {base['images']} test "
        f"images, {base['miou']:.1f} % unpatched, no retraining"
    )
    figure, panels = figure_of(title)
    groups = [[n for n in named if near_60[n] >= -limit], [n for n in named if near_60[n] < -limit]]
    for axes, group, text in zip(panels, groups, ("lose little", "lose more")):
        ends, colours = [], []
        group = sorted(group, key=near_60.get, reverse=True)
        for index, name in enumerate(group):
            own = sorted(named[name], key=lambda row: -row["share"])
            axes.errorbar([100 * r["share"] for r in own], [r["diff"] for r in own], yerr=[r["diff_se"] for r in own],
                          color=colour(index), marker="o", markersize=3.5, linewidth=1.3, elinewidth=0.8)  # fmt: skip
            ends.append((100 * own[-1]["share"], own[-1]["diff"]))
            colours.append(colour(index))
        axes.axhline(0, color="0.5", linewidth=0.9, linestyle="--")
        axes.invert_xaxis()
        axes.set_xlabel("multiply-adds, percent of unpatched")
        axes.set_ylabel("mIoU, points against unpatched")
        axes.set_title(f"methods that {text} at 60 %", fontsize=10)
        label_ends(axes, ends, group, colours)
    figure.savefig(path, dpi=110)


def short(setting: str) -> str:
    """A setting as it fits beside a panel."""
    for long, brief in ((" flops=0.6", ""), (", reconstruct norm=", ", "), (" temperature=", " T=")):
        setting = setting.replace(long, brief)
    return setting


def points(rows: list[Row], path: Path, limit: float) -> None:
    """Cosine over time: settings above `limit`, and the others."""
    base = next(row for row in rows if row["method"] == "unpatched")
    rows = [row for row in rows if row["method"] != "unpatched"]
    title = f"{base['weights']}, {base['size'].replace('x', ' x ')}, {base['images']} images, 60 % of the multiply-adds"
    figure, panels = figure_of(title)
    groups = [[r for r in rows if r["cosine"] >= limit], [r for r in rows if r["cosine"] < limit]]
    for axes, group in zip(panels, groups):
        for index, row in enumerate(group):
            axes.errorbar(row["time_ratio"], row["cosine"], yerr=row["cosine_se"], fmt="o", color=colour(index),
                          markersize=5)  # fmt: skip
        axes.axvline(1, color="0.5", linewidth=0.9, linestyle="--")
        axes.set_xlabel("CPU time, unpatched = 1")
        axes.set_ylabel("cosine of lifted features to the unpatched ones")
        names = [short(row["setting"]) for row in group]
        label_ends(axes, [(r["time_ratio"], r["cosine"]) for r in group], names, [colour(i) for i in range(len(group))])
    figure.savefig(path, dpi=110)


def markdown(rows: list[Row]) -> str:
    """The tables of a page: methods by share and head, then the settings in one place; or agreement, best first."""
    if "head" not in rows[0]:
        return _table(
            ("setting", "GMACs", "CPU time (quartiles)", "cosine", "worst tenth", "saliency: mean difference",
             "IoU", "correlation"),
            [(f"`{r['setting'].replace(' flops=0.6', '')}`", r["gmacs"], _time(r), _pm(r, "cosine", 3),
              f"{float(r['cosine_worst_tenth']):.3f}", _pm(r, "saliency_mae", 3), _pm(r, "saliency_iou", 3),
              _pm(r, "saliency_corr", 3)) for r in rows],
        )  # fmt: skip
    heads = list(dict.fromkeys(row["head"] for row in rows))
    by_key = {(row["head"], row["setting"]): row for row in rows}
    named: dict[str, list[str]] = {}
    for row in rows:
        if row["head"] == heads[0] and row["method"] != "unpatched" and not row["setting"].startswith("one third"):
            named.setdefault(row["setting"].split(" flops=")[0], []).append(row["setting"])
    shares = sorted({round(row["share"], 1) for row in rows if "flops=" in row["setting"]}, reverse=True)
    shares = [share for share in shares if share in (0.8, 0.6, 0.4)]
    lines: list[tuple[float, Sequence[str]]] = []
    for name, settings in named.items():
        at = {share: [s for s in settings if abs(by_key[heads[0], s]["share"] - share) < 0.03] for share in shares}
        cells = [
            _pm(by_key[head, at[share][0]], column, 1, sign=column == "diff") if at[share] else ""
            for head in heads for column in ("diff", "agreement") for share in shares
        ]  # fmt: skip
        middle = by_key[heads[0], at[0.6][0]] if at.get(0.6) else None
        last, rank = (_time(middle), float(middle["agreement"])) if middle else ("", 0.0)
        lines.append((rank, (f"`{name}`", *cells, last)))
    lines.sort(key=lambda line: -line[0])
    width = len(shares) * 2
    tables = [
        f"{head} head, {by_key[head, 'unpatched']['miou']:.1f} % mIoU unpatched:\n\n" + _table(
            ("", *(f"points at {share:.0%}" for share in shares), *(f"agreement at {share:.0%}" for share in shares),
             "CPU time at 60 %"),
            [(cells[0], *cells[1 + width * i : 1 + width * (i + 1)], cells[-1]) for _, cells in lines],
        )
        for i, head in enumerate(heads)
    ]  # fmt: skip
    first = "\n\n".join(tables)
    place = [r for r in rows if r["setting"].startswith("one third") and r["head"] == heads[0]]
    second = _table(
        ("after one third", "share", *(f"{head}: points" for head in heads), *(f"{head}: agreement" for head in heads),
         "CPU time"),
        [(r["setting"].removeprefix("one third: "), f"{100 * r['share']:.1f} %",
          *(_pm(by_key[head, r["setting"]], "diff", 1, sign=True) for head in heads),
          *(_pm(by_key[head, r["setting"]], "agreement", 1) for head in heads), _time(r)) for r in place],
    )  # fmt: skip
    return f"{first}\n\n{second}"


def with_tables(text: str, folder: Path) -> str:
    """A page with the tables between its markers written anew from the CSV files beside it."""
    return re.sub(
        r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{markdown(read(folder / found[2]))}\n{found[3]}", text, flags=re.DOTALL,
    )  # fmt: skip


def _pm(row: Row, key: str, digits: int, sign: bool = False) -> str:
    return f"{float(row[key]):{'+' if sign else ''}.{digits}f} ± {float(row[key + '_se']):.{digits}f}"


def _time(row: Row) -> str:
    return f"{row['time_ratio']:.2f} ({float(row['time_q1']):.2f} to {float(row['time_q3']):.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    if sys.argv[1] == "--page":
        page = Path(sys.argv[2])
        page.write_text(with_tables(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
        return
    for path in map(Path, sys.argv[1:]):
        rows = read(path)
        if "head" not in rows[0]:
            cosines = sorted(row["cosine"] for row in rows if row["method"] != "unpatched")
            points(rows, path.with_suffix(".png"), float(np.median(cosines)))
            continue
        for head in dict.fromkeys(row["head"] for row in rows):
            curves([row for row in rows if row["head"] == head], path.with_name(f"{path.stem}_{head}.png"), 4.0)


if __name__ == "__main__":
    main()
