"""The page of every method: its class, its configurations, what was measured, and its images where there are any."""

from __future__ import annotations

import csv
import inspect
import json
import re
from pathlib import Path
from typing import Any

import tokenzoo
from tokenzoo.adapters.registry import families
from tokenzoo.cli.list_command import describe_method
from tokenzoo.core.describing import _entries, _sections
from tokenzoo.core.method import Method
from tokenzoo.core.traits import Place, Traits

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "build" / "gallery"
PLACES = {
    "embed": "before block 0, on what the patch embedding gives",
    "before": "at the start of a block, in front of attention",
    "around": "around {}: tokens merge in front and come apart behind",
    "ahead": "in front of attention, which sees fewer tokens",
    "queries": "on the queries of attention",
    "between": "between attention and MLP",
    "after": "at the end of a block",
    "norm": "behind the final norm",
    "maps": "on the output of a decoder",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table, its cells on one line."""
    clean = [tuple(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *clean))


def method_page(name: str) -> str:
    """Markdown of one method; links are those of a page docs/methods/NAME.md."""
    about, cls = describe_method(name), tokenzoo.method_class(name)
    parts = [
        f"# {name}\n\n{about['summary']}",
        f"*{about['source']}* · kind: {about['kind']} · `tokenzoo.{cls.__name__}` · `tokenzoo list {name}`",
        _images(name),
        f"## In one line\n\n```python\ntokenzoo.patch_model(model, {name!r})\n```",
        _options(cls),
        _more(cls),
        _acts(cls),
        _cannot(cls),
        _settings(name),
        _measured(name),
        _macs(cls),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def gallery_page() -> str:
    """All methods on the same three photographs."""
    said = _drawn()
    share = f"{said.get('share', 0.6):.0%}"
    parts = [
        "# Gallery",
        f"Every method at {share} of the unpatched multiply-adds, behind its last reducing block, on the same three "
        "photographs. `python scripts/gallery.py --output build/gallery` draws all of it, with `--model` and "
        "`--checkpoint` on a model of yours. The model of [the demo](demo.md) is small and knows twelve photographs: "
        "where a method looks at what the model finds important, a large model draws other maps.",
        "The photographs: chelsea (CC0, S. van der Walt), china (CC BY 2.0, danielbuechele), coffee (CC0, Rachel "
        "Michetti).",
    ]
    for name in tokenzoo.list_methods():
        entry = said.get("methods", {}).get(name, {})
        caption = f"{describe_method(name)['summary']}"
        parts.append(f"## [{name}](methods/{name}.md)\n\n{caption}")
        parts.append(_image(name, entry, "methods/"))
    return "\n\n".join(parts) + "\n"


def _drawn() -> dict[str, Any]:
    file = GALLERY / "gallery.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _image(name: str, entry: dict[str, str], folder: str = "") -> str:
    if not entry.get("last"):
        return f"Not drawn: {entry.get('reason') or 'scripts/gallery.py has not been run'}."
    text = f"Three photographs behind the last reducing block of {name}"
    return f"![{text}]({folder}{entry['last']})\n\nDrawn on {entry['about']}; last reduction: {entry['tokens']} tokens."


def _images(name: str) -> str:
    said = _drawn()
    entry = said.get("methods", {}).get(name, {})
    parts = [f"## On photographs, at {said.get('share', 0.6):.0%} of the multiply-adds", _image(name, entry)]
    if entry.get("blocks"):
        parts.append(f"![A photograph block by block under {name}]({entry['blocks']})")
    parts.append("All methods side by side: [gallery](../gallery.md).")
    return "\n\n".join(parts)


def _options(cls: type[Method]) -> str:
    words = _entries(_sections(inspect.cleandoc(cls.__doc__ or ""))[1])
    rows = []
    for name, default in cls.options().items():
        text = words.get(name, "").partition(": ")[2]
        rows.append((f"`{name}`", f"`{default!r}`", text))
    return "## Options\n\n" + table(("option", "default", "what it is"), rows)


def _more(cls: type[Method]) -> str:
    """What the docstring says behind its first sentence, without the options."""
    before, _, after = _sections(inspect.cleandoc(cls.__doc__ or ""))
    text = "\n\n".join(part for part in (before.partition("\n\n")[2], after) if part.strip())
    text = re.sub(r"^(Raises|Source|Returns|Attributes|Note):", r"**\1:**", text, flags=re.MULTILINE)
    return f"## More\n\n{text}" if text.strip() else ""


def _acts(cls: type[Method]) -> str:
    said = _entries(_sections(inspect.cleandoc(Traits.__doc__ or "").replace("Attributes:", "Args:"))[1])
    rows = []
    for field, default in Traits._field_defaults.items():
        value = getattr(cls.traits, field)
        if value == default and field != "place":
            continue
        meaning = " ".join(said.get(field, "").partition(": ")[2].split())
        rows.append((f"`{field}`", _trait(value), meaning))
    return "## Where it acts\n\n" + table(("trait", "here", "meaning"), rows)


def _trait(value: Any) -> str:
    if isinstance(value, Place):
        return PLACES[value.name].format(" and ".join(value.branches))
    if callable(value):
        return "depends on the options"
    if isinstance(value, tuple):
        return "yes"
    return {True: "yes", False: "no"}.get(value, f"`{value}`") if isinstance(value, bool) else f"`{value}`"


def _cannot(cls: type[Method]) -> str:
    """Refusals that follow from the traits, and those that its checks name below "Raises"."""
    traits = cls.traits
    scanning = ", ".join(f"[`{f.name}`](../families/{f.name}.md)" for f in families() if f.scans)
    lines = []
    if traits.scans is None:
        lines.append(f"Models that scan their tokens refuse it: {scanning}.")
    elif traits.scans.reads:
        lines.append(f"It reads a scan, so that only these families take it: {scanning}.")
    if traits.reads_maps:
        lines.append("Families without attention between tokens refuse it: [`xcit`](../families/xcit.md).")
    if traits.data_dependent:
        fixed = f" unless `{traits.static}` is given" if traits.static else ""
        lines.append(f"Token counts depend on the images{fixed}: no export then, see [exporting](../export.md).")
    for text in re.findall(r"^    \w+Error: ((?:.+\n?)(?:      +.+\n?)*)", inspect.getdoc(cls.check) or "", re.M):
        lines.append(f"Its check refuses: {' '.join(text.split())}")
    lines.append("What holds for all methods: [limits](../limits.md).")
    return "## What it cannot do\n\n" + "\n".join(f"- {line}" for line in lines)


def _settings(name: str) -> str:
    parts = []
    for file in sorted((ROOT / "configs").glob(f"{name}/*.yaml")):
        text = file.read_text(encoding="utf-8").rstrip()
        inner = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        kind = "training" if file.stem.endswith("_train") else "recipe"
        title = f"{file.relative_to(ROOT).as_posix()} ({kind})"
        parts.append(f'??? example "{title}"\n\n    ```yaml\n{inner}\n    ```')
    return "## Published settings\n\nWith their sources in the comments.\n\n" + "\n\n".join(parts) if parts else ""


def _rows(pattern: str, name: str, needs: str) -> list[tuple[Path, list[dict[str, str]]]]:
    found = []
    for file in sorted((ROOT / "benchmarks").glob(pattern)):
        with file.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        if rows and {needs, "method"} <= set(rows[0]):
            own = [row for row in rows if row["method"] == name]
            found += [(file, own)] if own else []
    return found


def _measured(name: str) -> str:
    parts = []
    for file, rows in _rows("accuracy/*.csv", name, "diff_se"):
        link = f"[{file.stem}](../../{file.relative_to(ROOT).as_posix()})"
        body = [
            (r["setting"], f"{100 * float(r['share']):.1f} %", r["top1"], f"{float(r['diff']):+.2f} ± {r['diff_se']}")
            if r["share"]
            else (r["setting"], "", "", f"not measured: {r['note']}")
            for r in rows
        ]
        head = ("setting", "multiply-adds", "top-1", "difference to unpatched, points")
        parts.append(f"Accuracy, {link}, {rows[0]['images']} images:\n\n{table(head, body)}")
    for file, rows in _rows("speed/bench_*.csv", name, "speedup_q1"):
        link = f"[{file.stem}](../../{file.relative_to(ROOT).as_posix()})"
        body = [
            (
                r["model"], f"`{r['method_kwargs'] or '{}'}`", r["infer_gmacs"], r["speedup"],
                f"{r['speedup_q1']} to {r['speedup_q3']}",
            )
            for r in rows
        ]  # fmt: skip
        head = ("model", "options", "GMACs", "speed-up", "quartiles")
        where = f"{rows[0]['device']}, batch {rows[0]['infer_batch_size']}, {rows[0]['precision']}"
        parts.append(f"Speed, {link}, {where}:\n\n{table(head, body)}")
    if not parts:
        return "## Measured\n\nNo row of benchmarks/accuracy or of `tokenzoo bench` in benchmarks/speed has it alone."
    how = "How: [measuring](../measuring.md), [what was measured](../../benchmarks/README.md)."
    return "## Measured\n\n" + "\n\n".join([*parts, how])


def _macs(cls: type[Method]) -> str:
    if cls.macs is Method.macs:
        return ""
    code = inspect.cleandoc("\n" + inspect.getsource(cls.macs))
    inner = "\n".join(f"    {line}".rstrip() for line in code.splitlines())
    return f'## Its own cost\n\n??? note "Multiply-adds of deciding and applying"\n\n    ```python\n{inner}\n    ```'
