"""Words for options that many methods share: said once here, shown in the docstring of every method that has them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap

from .method import Method

SHARED = {
    "keep_rate": "share of the patches to keep at each layer, in (0, 1]; one value or one per layer.",
    "tokens": "patches to keep instead, an int or one entry per layer (None uses the rate there).",
    "mass": "share of the attention mass to keep instead, in (0, 1]: in each image the fewest patches that hold it "
    "(the rule of ZipVL, He et al., 2024). Images keep different counts and the longest is read on the host; `tokens` "
    "is then a budget that no image exceeds, and shapes are static.",
    "r": "tokens to remove per layer: an int, a list with one entry per layer (missing ones 0), or (r, slope), see "
    "`tokenzoo.schedules.removed_per_layer`.",
    "clip": "remove fewer where r exceeds half of the patches, instead of refusing.",
    "prop_attn": "add the log size of a token to its attention logit.",
    "layers": "blocks to act in",
}

_ENTRY = re.compile(r"^    (\w+): ", re.MULTILINE)
_WIDTH = 116


def complete(cls: type[Method]) -> None:
    """Puts what a docstring leaves out of its options into its section Args, in the order of the options.

    Options that the docstring describes itself stay as they are; so does a class without a docstring.
    """
    doc = inspect.cleandoc(cls.__doc__ or "").strip()
    if not doc or doc.startswith(f"{cls.__name__}("):  # what a dataclass writes for itself
        return
    before, args, after = _sections(doc)
    own = _entries(args)
    words = {name: own.get(name) or _shared(cls, name) for name in _order(cls)}
    lines = [text for text in words.values() if text]
    lines += [text for name, text in own.items() if name not in words]
    if lines:
        section = "\n".join(["Args:", *lines])
        cls.__doc__ = "\n\n".join(part for part in (before, section, after) if part)


def described(doc: str) -> set[str]:
    """Names that the section Args of a docstring describes."""
    return set(_entries(_sections(inspect.cleandoc(doc))[1]))


def _order(cls: type[Method]) -> list[str]:
    """Options as they are declared, the blocks last."""
    names = [field.name for field in dataclasses.fields(cls)]
    return sorted(names, key=lambda name: name == "layers")


def _sections(doc: str) -> tuple[str, str, str]:
    """What stands before the section Args, in it, and behind it."""
    found = re.search(r"^Args:\n((?:    .*\n?|\n(?=    ))*)", doc, re.MULTILINE)
    if found is None:  # the source comes last
        before, source, after = doc.partition("\n\nSource: ")
        return before, "", source.strip("\n") + after
    return doc[: found.start()].rstrip(), found.group(1).rstrip(), doc[found.end() :].strip()


def _entries(args: str) -> dict[str, str]:
    """Lines of a section Args by option."""
    starts = list(_ENTRY.finditer(args))
    ends = [entry.start() for entry in starts[1:]] + [len(args)]
    return {entry.group(1): args[entry.start() : end].rstrip() for entry, end in zip(starts, ends)}


def _shared(cls: type[Method], name: str) -> str:
    """The line of an option that the docstring leaves out; empty for one that nobody has words for."""
    text = SHARED.get(name, "")
    if name == "layers":
        text += f"; by default {_default_layers(cls)}." if cls.default_layers is Method.default_layers else "."
    if not text:
        return ""
    return textwrap.fill(f"{name}: {text}", _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)


def _default_layers(cls: type[Method], depth: int = 12) -> str:
    """In the words of the rule where it has a docstring ("Blocks at ..."), else as the blocks of some depth."""
    rule = cls.schedule.layers
    if rule is not None and rule.__doc__:
        return rule.__doc__.strip().rstrip(".").removeprefix("Blocks ")
    layers = cls.schedule.default_layers(depth)
    if len(layers) == depth:
        return "all"
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]} of {depth}"
    return f"{', '.join(map(str, layers))} of {depth}"
