"""Writes the README's tables from the registries and from results/: python scripts/readme_tables.py [--check]"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenzoo
from tokenzoo.adapters.backbone import Family
from tokenzoo.adapters.registry import families
from tokenzoo.cli.list_command import describe_method

README = Path(__file__).parents[1] / "README.md"
SPEED = README.parent / "results" / "bench_deit_small.csv"


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


def backbones_table() -> str:
    """Every family: what it covers, model and block classes, and what its checks refuse."""
    rows = []
    for family in families():
        classes = (", ".join(f"`{cls.__name__}`" for cls in group) for group in (family.models, family.blocks))
        rows.append((f"`{family.name}`", family.summary, *classes, refusals(family)))
    return _table(("family", "covers", "models", "blocks", "refused"), rows)


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
        f"`results/{file.name}`, written by:"
    )
    command = f"```bash\n{first['command']}\n```"
    return "\n\n".join(["## Speed", f"{setting} {meaning}", command, _table(head, body)]) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(text: str) -> str:
    """The README's text with fresh tables.

    Raises:
        ValueError: a pair of marker comments is missing.
    """
    for name, table in (("methods", methods_table()), ("backbones", backbones_table()), ("speed", speed_section())):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{README.name} needs the lines {begin!r} and {end!r} once each")
        before, rest = text.split(begin)
        inside = f"{table}\n" if table else ""
        text = f"{before}{begin}\n{inside}{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables are stale")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        if new != old:
            sys.stderr.write(f"the tables in {README.name} are stale; run python scripts/readme_tables.py\n")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
