"""`tokenzoo list`: methods and backbones, or one method with its options."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import Any

from ..adapters.registry import families, load_installed
from ..core.method import plain
from ..core.registry import list_methods, method_class
from ..models import list_models
from ..vlm.registry import find, list_droppers, list_selectors
from .common import say

HELP = "methods, backbones, selectors and droppers of the zoo, or one of these with its options"
EXAMPLE = "tokenzoo list tome"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """METHOD and --json."""
    parser.add_argument("method", nargs="?", default=None, metavar="METHOD", help="describe this method only")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    """Prints what the registries hold."""
    if args.method is not None:
        beyond = find(args.method)
        first = _described(beyond) if beyond and args.method not in list_methods() else describe_method(args.method)
        say(json.dumps(first, indent=2) if args.json else _method_text(first))
        if beyond and args.method in list_methods() and not args.json:
            say(f"\nof the same name, for vision-language models:\n\n{_method_text(_described(beyond))}")
        return
    methods = [describe_method(name) for name in list_methods()]
    load_installed()
    backbones = [
        {
            "family": f.name,
            "summary": f.summary,
            "classes": [cls.__name__ for cls in f.models],
            "around": [cls.__name__ for cls in f.around],
            "tried": f.tried,
        }
        for f in families()
    ]
    if args.json:
        found = {"methods": methods, **_beyond(), "backbones": backbones, "models": list_models()}
        say(json.dumps(found, indent=2))
        return
    _say_methods("methods", methods)
    for title, found in _beyond().items():
        say()
        _say_methods(f"{title} of vision-language models", found)
    say("\nbackbones")
    for family in backbones:
        say(f"  {family['family']}: {', '.join(family['classes'])}")
        if family["around"]:
            say(f"    around these: {', '.join(family['around'])}")
        say(f"    {family['summary']}{'; tried on ' + family['tried'] if family['tried'] else ''}")
    say("\nmodels that timm lacks, for timm.create_model")
    for name, summary in list_models().items():
        say(f"  {name}: {summary}")


def _beyond() -> dict[str, list[dict[str, Any]]]:
    """Selectors and droppers, which act outside of a backbone."""
    names = {"selectors": list_selectors(), "droppers": list_droppers()}
    return {title: [_described(find(name)) for name in found] for title, found in names.items()}


def _say_methods(title: str, methods: list[dict[str, Any]]) -> None:
    say(title)
    widths = {key: max(len(method[key]) for method in methods) for key in ("name", "kind")}
    for method in methods:
        say(f"  {method['name']:{widths['name']}}  {method['kind']:{widths['kind']}}  {method['summary']}")
        say(f"  {'':{widths['name']}}  {'':{widths['kind']}}  {method['source']}")


def describe_method(name: str) -> dict[str, Any]:
    """Name, kind, one-sentence summary, source, options with defaults, and docstring of a method; JSON safe.

    Raises:
        ValueError: no method has this name.
    """
    return _described(method_class(name))


def _described(cls: Any) -> dict[str, Any]:
    doc = inspect.cleandoc(cls.__doc__ or "")
    first = " ".join(doc.split("\n\n")[0].split())
    return {
        "name": cls.name,
        "kind": cls.kind,
        "summary": re.match(r".*?(?:\.(?=\s|$)|$)", first).group(),
        "source": cls.source,
        "options": {key: plain(value) for key, value in cls.options().items()},
        "doc": doc,
    }


def _method_text(method: dict[str, Any]) -> str:
    options = [f"  {key} = {json.dumps(value)}" for key, value in method["options"].items()]
    return "\n".join([f"{method['name']} ({method['kind']})", "", method["doc"], "", "Defaults:", *options])
