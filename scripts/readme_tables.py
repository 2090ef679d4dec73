"""Writes the tables of the README and of docs/, and the stub of the package, from the registries and from benchmarks/.

    python scripts/readme_tables.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenzoo
from tokenzoo.adapters.backbone import Family
from tokenzoo.adapters.registry import families, load_installed
from tokenzoo.cli.list_command import describe_method
from tokenzoo.vlm.family import vlm_families
from tokenzoo.vlm.registry import find, list_droppers, list_selectors

load_installed()  # the tables name families of packages that are no dependency too
ROOT = Path(__file__).parents[1]
FREE = ROOT / "benchmarks" / "accuracy" / "tin200_free.csv"
TUNED = ROOT / "benchmarks" / "accuracy" / "tin200_tuned.csv"
SHOWN = ("ppt", "mctf", "tome", "evit", "random")  # in the README
SHARES = (0.85, 0.7, 0.6, 0.5)
SPEED = ROOT / "benchmarks" / "speed" / "bench_deit_small.csv"


def methods_in_short() -> str:
    """Every registered method with its source, a line per kind: the page stays short, however many there are."""
    kinds: dict[str, list[str]] = {}
    for row in map(describe_method, tokenzoo.list_methods()):
        kinds.setdefault(row["kind"], []).append(f"`{row['name']}` ({row['source']})")
    rows = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    return _table(("kind", "methods"), [(kind, ", ".join(found)) for kind, found in rows])


def methods_table() -> str:
    """Every registered method: name, class, kind, first sentence of its docstring, source."""
    rows = [describe_method(name) for name in tokenzoo.list_methods()]
    return _table(
        ("name", "class", "kind", "what it does", "source"),
        [
            (f"`{r['name']}`", f"`{tokenzoo.method_class(r['name']).__name__}`", r["kind"], r["summary"], r["source"])
            for r in rows
        ],
    )


def vlm_methods_table() -> str:
    """Every selector and dropper: what it does, what it reads, what its authors do with positions, and the source."""
    rows = []
    for name in (*list_selectors(), *list_droppers()):
        cls = find(name)
        summary = " ".join(inspect.cleandoc(cls.__doc__).split("\n\n")[0].split())
        act = "dropper" if name in list_droppers() else "selector"
        reads = ", ".join(cls.reads) if act == "selector" else f"{cls.scored_by} layer".removeprefix("none layer")
        rows.append((f"`{name}`", f"`{cls.__name__}`", act, summary, reads, cls.positions, cls.source))
    return _table(("name", "class", "acts as", "what it does", "reads", "published positions", "source"), rows)


def vlm_families_table() -> str:
    """Every family of vision-language models."""
    rows = []
    for family in sorted(vlm_families(), key=lambda family: family.name):
        classes = ", ".join(f"`{cls.__name__}`" for cls in family.heads)
        rows.append((f"`{family.name}`", family.summary, classes, ", ".join(family.modalities), family.tried))
    return _table(("family", "covers", "models", "takes", "tried on"), rows)


def in_order() -> list[Family]:
    """All families, those of other packages last: the order in which these are met differs from run to run."""

    def place(family: Family) -> tuple[bool, str]:
        package = next(iter(family.models)).__module__.partition(".")[0]
        return (True, package) if package not in ("timm", "tokenzoo") else (False, "")

    return sorted(families(), key=place)


def backbones_in_short() -> str:
    """Every family and what it covers, a line per package that the models come from: the page stays short."""
    packages: dict[str, list[str]] = {}
    for family in in_order():
        origin = next(iter(family.models)).__module__
        package = "tokenzoo.models" if origin.startswith("tokenzoo.") else origin.partition(".")[0]
        covers = family.summary.partition(": ")[2] or family.summary
        packages.setdefault(package, []).append(f"`{family.name}` ({covers})")
    return _table(("models from", "families"), [(name, ", ".join(found)) for name, found in packages.items()])


def backbones_table() -> str:
    """Every family: what it covers and was tried on, model and block classes, and what its checks refuse."""
    rows = []
    for family in in_order():
        groups = ((*family.models, *family.around), family.blocks)
        classes = (", ".join(f"`{cls.__name__}`" for cls in group) for group in groups)
        rows.append((f"`{family.name}`", family.summary, family.tried, *classes, refusals(family)))
    return _table(("family", "covers", "tried on", "models", "blocks", "refused"), rows)


def refusals(family: Family) -> str:
    """What the docstrings of a family's checks name below "Raises"."""
    found = []
    for check in (family.check, family.check_recipe):
        doc = inspect.getdoc(check) or ""
        found += re.findall(r"^    \w+Error: ((?:.+\n?)(?:      +.+\n?)*)", doc, re.M)
    return "; ".join(" ".join(text.split()).rstrip(".") for text in found)


def speed_section(file: Path = SPEED) -> str:
    """The section on speed, every number from a file that `tokenzoo bench` wrote; nothing without the file."""
    if not file.is_file():
        return ""
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    first = rows[0]
    how = f"torch.compile {first['compiled']}" if first["compiled"] else "eager"
    threads = "" if first["clock"].endswith("synchronized") else f", threads: {first['threads']}"
    head = ("method", "options", "GMACs", "img/s", "speed-up", "quartiles", "GMAC ratio", "speed-up / GMAC ratio")
    body = [
        (
            f"`{r['method']}`" if r["method"] in tokenzoo.list_methods() else r["method"],
            ", ".join(f"{key}={value}" for key, value in json.loads(r["method_kwargs"] or "{}").items())
            or ("" if r["method"] == "unpatched" else "defaults"),
            f"{float(r['infer_gmacs']):.2f}",
            f"{float(r['infer_samples_per_sec']):.1f}",
            f"{float(r['speedup']):.2f}",
            f"{float(r['speedup_q1']):.2f} to {float(r['speedup_q3']):.2f}",
            f"{float(r['gmac_ratio']):.2f}",
            f"{float(r['speedup_per_gmac_ratio']):.2f}",
        )
        for r in rows
    ]
    loaded = any(flag in first["command"] for flag in ("--pretrained", "--checkpoint"))
    setting = (
        f"`{first['model']}`{'' if loaded else ' with random weights'} at {first['infer_img_size']}, "
        f"batch {first['infer_batch_size']}, {how}, "
        f"{first['precision']}, {first['device']}{threads}, torch {first['torch']}, timm {first['timm']}."
    )
    meaning = (
        f"Medians of {first['rounds']} rounds; in every round each model is timed once, so that drift hits all alike. "
        "Speed-up is the unpatched time over the method's own, GMAC ratio the same of multiply-adds. From "
        f"`benchmarks/speed/{file.name}`, written by:"
    )
    # recorded before the files moved here
    command = f"```bash\n{first['command'].replace(' results/', ' benchmarks/speed/')}\n```"
    return "\n\n".join(["## Speed", f"{setting} {meaning}", command, _table(head, body)]) + "\n"


def accuracy_in_short() -> str:
    """The best known methods on real weights: differences to the unpatched model, off the shelf and fine-tuned."""
    rows, base = _free()
    if not rows:
        return ""
    tuned = {r["method"]: r for r in _read(TUNED)[2:]}
    names = [name for name in _by_value(rows) if name in SHOWN]
    body = [
        (f"`{name}`", *(_of(rows.get((name, share))) for share in SHARES),
         _of(tuned.get(name), "diff_control")) for name in names
    ]  # fmt: skip
    head = ("", "85 % of the GMACs", "70 %", "60 %", "50 %", "60 %, fine-tuned")
    setting = (
        f"[ViT-Ti/16](benchmarks/models/vit_tiny_tin200.md), {float(base['top1']):.1f} % of 200 classes: difference to "
        f"unpatched in points, paired; {_count(rows)} images."
    )
    return f"{setting}\n\n{_table(head, body)}"


def accuracy_free() -> str:
    """All training-free methods at four shares: differences to the unpatched model, then time, then what is missing."""
    rows, base = _free()
    if not rows:
        return ""
    names = _by_value(rows)
    head = ("", *(f"{100 * share:.0f} %" for share in SHARES))
    differences = [
        (f"`{n}`", *(_of(rows.get((n, s))) for s in SHARES), _of(rows.get((n, 0.6)), "diff_random")) for n in names
    ]  # fmt: skip
    times = [(f"`{n}`", *(_time(rows.get((n, s))) for s in SHARES)) for n in names]
    missing = [f"- `{r['method']}` at {100 * float(r['asked']):.0f} %: {r['note']}" for r in rows.values() if r["note"]]
    return "\n\n".join([
        f"{_setting(base, rows, '../models/vit_tiny_tin200.md')}, {base['device']}.\n"
        "The last column: to patches dropped at random, at the same share.",
        _table((*head, "60 %, to `random`"), differences),
        "Time of the processor over that of the unpatched model, batches of 50 in turn: median (quartiles).",
        _table(head, times),
        "Out of reach:",
        "\n".join(missing) or "- nothing",
    ])  # fmt: skip


def accuracy_tuned() -> str:
    """Fine-tuned models beside the same methods off the shelf."""
    rows = _read(TUNED)
    if not rows:
        return ""
    body = [
        (f"`{r['method']}`" if r["method"] in tokenzoo.list_methods() else r["setting"], r["free_top1"], r["top1"],
         _of(r, "diff_free"), _of(r), _of(r, "diff_control")) for r in rows
    ]  # fmt: skip
    head = ("", "off the shelf", "fine-tuned", "gain", "to the unpatched model as it was", "to it fine-tuned likewise")
    return f"{rows[0]['images']} images.\n\n" + _table(head, body)


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _free() -> tuple[dict[tuple[str, float], dict[str, str]], dict[str, str]]:
    """Rows by method and share, and that of the unpatched model."""
    base, *rows = _read(FREE) or [{}]
    return {(r["method"], float(r["asked"])): r for r in rows}, base


def _by_value(rows: dict[tuple[str, float], dict[str, str]]) -> list[str]:
    """Methods by what they lose at 60 %, those without such a row last."""
    reached = {name: float(r["diff"]) for (name, share), r in rows.items() if share == 0.6 and r["diff"]}
    names = dict.fromkeys(name for (name, _), r in rows.items() if r["diff"])
    return sorted(names, key=lambda name: -reached.get(name, float("-inf")))


def _count(rows: dict[tuple[str, float], dict[str, str]]) -> str:
    counts = sorted({int(r["images"]) for r in rows.values() if r["images"]})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _setting(base: dict[str, str], rows: dict[tuple[str, float], dict[str, str]], card: str) -> str:
    return (
        f"ViT-Ti/16 ([card]({card}), {float(base['top1']):.1f} % of 200 classes of Tiny-ImageNet): difference in\n"
        f"points of top-1 to the unpatched model, paired, ± standard error; {_count(rows)} images, float32, one thread"
    )


def _of(row: dict[str, str] | None, key: str = "diff") -> str:
    return "" if row is None or not row.get(key) else f"{float(row[key]):+.1f} ± {float(row[f'{key}_se']):.1f}"


def _time(row: dict[str, str] | None) -> str:
    if row is None or not row["time_ratio"]:
        return ""
    return f"{float(row['time_ratio']):.2f} ({float(row['time_q1']):.2f} to {float(row['time_q3']):.2f})"


def stub() -> str:
    """`tokenzoo/__init__.pyi`: the package's own imports, and the classes of methods, which the registry exports."""
    tree = ast.parse((ROOT / "tokenzoo" / "__init__.py").read_text(encoding="utf-8"))
    hidden = [node for part in tree.body if isinstance(part, ast.If) for node in part.body]  # for type checkers alone
    lines = []
    for node in (*tree.body, *hidden):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = (alias.name for alias in node.names if alias.name in tokenzoo.__all__)
            lines += [f"from .{node.module or ''} import {name} as {name}" for name in names]
    found = [tokenzoo.method_class(name) for name in tokenzoo.list_methods()]
    found += [find(name) for name in (*list_selectors(), *list_droppers())]
    for cls in found:
        lines.append(f"from {cls.__module__.removeprefix('tokenzoo')} import {cls.__name__} as {cls.__name__}")
    head = "# written by scripts/readme_tables.py: type checkers do not see what the registry exports\n"
    return head + "\n".join(lines) + "\n\n__version__: str\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# which tables stand between the marker comments of which page
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": methods_in_short, "backbones": backbones_in_short, "accuracy": accuracy_in_short},
    "benchmarks/accuracy/accuracy.md": {"free": accuracy_free, "tuned": accuracy_tuned},
    "docs/methods.md": {"methods": methods_table},
    "docs/backbones.md": {"backbones": backbones_table},
    "docs/vlm.md": {"selectors": vlm_methods_table, "families": vlm_families_table},
    "docs/measuring.md": {"speed": speed_section},
}


def render(page: str, text: str) -> str:
    """A page's text with fresh tables.

    Args:
        page: its path, one of `PAGES`.
        text: what it holds now.

    Raises:
        ValueError: a pair of marker comments is missing.
    """
    for name, write in PAGES[page].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} needs the lines {begin!r} and {end!r} once each")
        before, rest = text.split(begin)
        table = write()
        inside = f"{table}\n" if table else ""
        text = f"{before}{begin}\n{inside}{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    args = parser.parse_args()
    stale = 0
    for page in PAGES:
        file = ROOT / page
        old = file.read_text(encoding="utf-8")
        new = render(page, old)
        if args.check and new != old:
            sys.stderr.write(f"the tables in {page} are stale; run python scripts/readme_tables.py\n")
            stale = 1
        elif new != old:
            file.write_text(new, encoding="utf-8")
    file = ROOT / "tokenzoo" / "__init__.pyi"
    if not file.is_file() or file.read_text(encoding="utf-8") != stub():
        if args.check:
            sys.stderr.write("tokenzoo/__init__.pyi is stale; run python scripts/readme_tables.py\n")
            stale = 1
        else:
            file.write_text(stub(), encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
