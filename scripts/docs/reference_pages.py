"""The API reference: what mkdocstrings is asked to describe, from the lists of public names."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import tokenzoo

MODULES = {
    "tokenzoo.core.schedule": "Schedules: how options become a strength per block.",
    "tokenzoo.core.tokens": "Tokens and their side data, as methods see them.",
    "tokenzoo.view.maps": "Images of token maps.",
    "tokenzoo.evaluation": "Accuracy and speed.",
    "tokenzoo.tuning": "The search behind `tokenzoo.tune`.",
    "tokenzoo.training": "Training and losses.",
    "tokenzoo.dense": "Segmentation models.",
    "tokenzoo.vlm": "Selecting the image tokens that a language model reads.",
    "tokenzoo.models": "Backbones that timm lacks.",
}


def reference_pages() -> dict[str, str]:
    """Page under docs/ -> markdown: the package itself, and a page per public module."""
    classes = {tokenzoo.method_class(name).__name__ for name in tokenzoo.list_methods()}
    names = [name for name in tokenzoo.__all__ if name not in classes]
    methods = ", ".join(f"[`{tokenzoo.method_class(n).__name__}`](../methods/{n}.md)" for n in tokenzoo.list_methods())
    head = f"# tokenzoo\n\nEvery method is a class of the package with a page of its own: {methods}."
    pages = {"api/tokenzoo.md": "\n\n".join([head, *_entries(tokenzoo, names)]) + "\n"}
    for path, about in MODULES.items():
        module = import_module(path)
        body = _entries(module, [name for name in module.__all__])
        pages[f"api/{path.removeprefix('tokenzoo.').replace('.', '_')}.md"] = (
            "\n\n".join([f"# {path}\n\n{about}", *body]) + "\n"
        )
    return pages


def _entries(module: ModuleType, names: list[str]) -> list[str]:
    found = []
    for name in sorted(names, key=str.lower):
        value = getattr(module, name)
        if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        found.append(f"::: {module.__name__}.{name}\n    options:\n      heading_level: 2")
    return found
