"""The page of every backbone family, from the registry."""

from __future__ import annotations

import inspect
import re

from method_pages import table

import tokenzoo
from tokenzoo.adapters.backbone import Family
from tokenzoo.adapters.registry import families, load_installed


def all_families() -> list[Family]:
    """Those of installed packages too."""
    load_installed()
    return list(families())


def family_page(family: Family) -> str:
    """Markdown of one family; links are those of a page docs/families/NAME.md."""
    origin = sorted({cls.__module__.partition(".")[0] for cls in family.models})
    parts = [
        f"# {family.name}\n\nCovers {family.summary}.",
        f"Models from: {', '.join(origin)}. Tried on: {family.tried or 'the models of this package'}.",
        f"## Classes\n\n{_classes(family)}",
        "Classes are matched exactly: a subclass, or a changed attention layer inside a block, is refused by its name.",
        f"## Refused\n\n{_refused(family)}",
        f"## Methods\n\n{_methods(family)}",
        "How models of this and other libraries are given: [backbones](../backbones.md). A family of your own: "
        "[the contract](../backbones.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _classes(family: Family) -> str:
    rows = [("model", f"`{cls.__module__}.{cls.__qualname__}`") for cls in family.models]
    rows += [
        ("around one", f"`{cls.__module__}.{cls.__qualname__}`, the backbone at `{known.path}`")
        for cls, known in family.around.items()
    ]
    rows += [("block", f"`{cls.__module__}.{cls.__qualname__}`") for cls in family.blocks]
    rows += [("attention", f"`{cls.__module__}.{cls.__qualname__}`") for cls in family.attentions]
    return table(("part", "class"), rows)


def _refused(family: Family) -> str:
    found = []
    for check in (family.check, family.check_recipe):
        doc = inspect.getdoc(check) or ""
        found += re.findall(r"^    \w+Error: ((?:.+\n?)(?:      +.+\n?)*)", doc, re.M)
    lines = [f"- {' '.join(text.split()).rstrip('.')}" for text in found]
    if not lines:
        lines = ["- no setting of these classes beyond what [limits](../limits.md) names"]
    return "\n".join(lines)


def _methods(family: Family) -> str:
    classes = [tokenzoo.method_class(name) for name in tokenzoo.list_methods()]
    if family.scans:
        names = [cls.name for cls in classes if cls.traits.scans is not None]
        head = "Its blocks scan; methods that look at attention are refused. These declare that they work on scans:"
    else:
        names = [cls.name for cls in classes if cls.traits.scans is None or not cls.traits.scans.reads]
        head = "Those that need no scan, each within the refusals above and its own:"
    return head + "\n\n" + ", ".join(f"[`{name}`](../methods/{name}.md)" for name in names) + "."
