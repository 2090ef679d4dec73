"""Methods written against version 0.1: properties where traits are declared now, hooks that have moved."""

from __future__ import annotations

import warnings
from typing import Any

from .mixins import HOOKS
from .traits import Place

# what a trait was called when it was a property of its own -> the trait
RENAMED = {
    "place": "place=...", "branches": "place=around(...)", "matches_once": "place=around(..., once=True)",
    "merges_stream": "place=around(..., stream=True)",
    "replaces_attention": "place=around('attention', replaces_attention=True)", "uses_size": "sizes=True",
    "proportional": "proportional=...", "mass_weighted_pool": "mass_pool=...", "uses_positions": "positions=True",
    "reads_attention": "reads_attention=True", "merges": "merges=...", "mixes": "mixes=...",
    "serves_scans": "scans=Scans()", "reads_scan": "scans=Scans(reads=True)",
    "keeps_scan_values": "scans=Scans(values=...)", "keeps_order": "scans=Scans(ordered=True)",
    "gap_rule": "scans=Scans(gap_rule=...)", "scores_tokens": "carries=True", "opens_span": "opens_span=True",
    "closes_span": "closes_span=...", "decodes_reduced": "decodes_reduced=...", "keeps_trace": "keeps_trace=...",
    "data_dependent": "data_dependent=...", "static_option": "static='...'", "pads": "pads=...",
}  # fmt: skip
_PLACE = {
    "place": "name", "branches": "branches", "matches_once": "once", "merges_stream": "stream",
    "replaces_attention": "replaces_attention",
}  # fmt: skip


def follow_old_names(cls: type) -> None:
    """Lets a class of version 0.1 go on, and says once how it is written now.

    Args:
        cls: a new subclass of `Method`.

    Raises:
        TypeError: a hook that stands in a mixin now.
    """
    own, fields = vars(cls), vars(cls).get("__annotations__", {})
    for mixin, hook in HOOKS.items():
        if hook in own and not issubclass(cls, mixin):
            raise TypeError(f"{cls.__name__} defines {hook}: inherit tokenzoo.core.mixins.{mixin.__name__} too")
    old = [name for name in RENAMED if name in own and (name not in fields or "ClassVar" in str(fields[name]))]
    told = [f"`{name}` as {RENAMED[name]}" for name in old]
    if set(old) & set(_PLACE):
        before = cls.traits.place
        cls.traits = cls.traits._replace(place=lambda method: _place_of(method, before))
    if callable(own.get("score")) and "carry" not in own:
        cls.carry, told = own["score"], [*told, "`score` as `carry(...)`"]
    if told:
        warnings.warn(
            f"{cls.__name__}: write {', '.join(told)}, in traits = Traits(...) (tokenzoo.core.traits); properties go "
            "on working in this version",
            DeprecationWarning,
            stacklevel=4,
        )


def _place_of(method: Any, before: Any) -> Place:
    """The place that properties of a class of version 0.1 say."""
    place = before(method) if callable(before) else before
    given = {}
    for name, field in _PLACE.items():
        for cls in type(method).__mro__:
            if name in vars(cls):
                if cls.__module__ != "tokenzoo.core.declared":
                    given[field] = getattr(method, name)
                break
    return place._replace(**given)
