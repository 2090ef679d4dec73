"""The list of backbone families; a family from outside joins it as those that come with the package do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from .attending import AttentionLayer
from .backbone import Around, Family
from .classes import class_of, path_of
from .hooked import HookedBlock
from .unserved import why_not
from .walk import Walk

_log = logging.getLogger(__name__)
_FAMILIES: dict[str, Family] = {}
_LATER: dict[str, list[str]] = {}  # package of a model's class -> modules of ours that register its families
_ORDER: list[str] = []  # those packages, met or not, as they stand in lists


def register_later(package: str, module: str) -> None:
    """Has a module imported, which registers families, once a model of a package that is no dependency is met.

    Args:
        package: the package that the models come from ("transformers").
        module: full name of the module that calls `register_family`.
    """
    _LATER.setdefault(package, []).append(module)
    if package not in _ORDER:
        _ORDER.append(package)


def meet(cls: type) -> None:
    """Registers the families of the package that a class comes from, if it is one of those that are not yet."""
    for base in cls.__mro__:
        _load(base.__module__.partition(".")[0])


def _load(package: str) -> None:
    if package not in _LATER:
        return
    for module in _LATER.pop(package):
        try:
            import_module(module)
        except ImportError as error:  # another version of the package is no reason to refuse models of others
            _log.warning("models of %s are not served: %s", package, error)


def load_installed() -> None:
    """Registers the families of all installed packages, also of those that no model has come from yet."""
    for package in list(_LATER):
        if find_spec(package) is not None:
            _load(package)


def register_family(family: Family) -> Family:
    """Adds a backbone family, so that `patch_model` and everything behind it serves its models.

    Args:
        family: exact classes and what patching makes of them.

    Returns:
        The family.

    Raises:
        TypeError: a reducing class that is not made of a mixin and, behind it, the class that it stands for.
        ValueError: its name is taken, or another family serves one of its model classes.
    """
    for plain in family.models:
        meet(plain)  # who serves it already has to be known
    for plain, known in family.around.items():
        if known.kind is not None and not issubclass(known.kind, plain):
            raise TypeError(f"{path_of(known.kind)} cannot stand for {path_of(plain)}: make it a subclass")
    for classes, mixin in ((family.models, Walk), (family.blocks, HookedBlock), (family.attentions, AttentionLayer)):
        for plain, reducing in classes.items():
            _refuse_strange(plain, reducing, mixin)
    taken = _FAMILIES.get(family.name)
    if taken is not None and taken is not family:
        raise ValueError(f"family name {family.name!r} is taken; give another one")
    for other in families():
        both = set(other.models) & set(family.models)
        if other is not family and both:
            raise ValueError(f"{', '.join(map(path_of, both))} is served by the family {other.name!r} already")
    _FAMILIES[family.name] = family
    ordered = sorted(_FAMILIES.items(), key=lambda item: _rank(item[1]))
    _FAMILIES.clear()
    _FAMILIES.update(ordered)
    return family


def _rank(family: Family) -> int:
    """Where a family stands among all: those of packages that are met at some time come last, in a fixed order."""
    packages = {cls.__module__.partition(".")[0] for cls in family.models}
    return max((1 + index for index, package in enumerate(_ORDER) if package in packages), default=0)


def _refuse_strange(plain: type, reducing: type, mixin: type) -> None:
    """Refuses a class that objects of the plain class cannot be given."""
    order = reducing.__mro__
    if mixin in order and plain in order and order.index(mixin) < order.index(plain):
        return
    shown = {Walk: "ReducingModel", HookedBlock: "ReducingBlock"}.get(mixin, mixin.__name__)
    raise TypeError(
        f"{path_of(reducing)} cannot stand for {path_of(plain)}: write class {reducing.__name__}({shown}, "
        f"{plain.__name__}), in this order"
    )


def families() -> tuple[Family, ...]:
    """All families in the order in which they were registered, those of packages that are met later at the end."""
    return tuple(_FAMILIES.values())


def family_of(model: nn.Module) -> Family | None:
    """The family that serves a model, patched or not; None where none does."""
    cls = class_of(model)
    meet(cls)
    return next((f for f in families() if cls in f.models or cls in f.models.values()), None)


def around_of(model: nn.Module) -> Around | None:
    """Where the backbone is in a model around one, which a family serves as a whole; None for all others."""
    meet(class_of(model))
    return next((known for f in families() if (known := f.around_of(model)) is not None), None)


def find_family(model: nn.Module) -> Family:
    """The family that serves a model's exact class, patched or not.

    Raises:
        TypeError: no family does; the message names the class, and a served model inside it if there is one.
    """
    family = family_of(model)
    if family is not None:
        return family
    refuse_around(model)
    known = why_not(class_of(model))
    if known is not None:
        raise TypeError(
            f"{path_of(class_of(model))} is not a backbone that tokenzoo can patch: it {known.why}; nearest: "
            f"{known.nearest}"
        )
    served = ", ".join(path_of(cls) for family in families() for cls in family.models)
    raise TypeError(
        f"{path_of(class_of(model))} is not a backbone that tokenzoo can patch; it serves exactly {served} (see "
        "tokenzoo.list_backbones()); a model that wraps one: patch the wrapped module"
    )


def refuse_around(model: nn.Module) -> None:
    """Refuses a model of a class that no family serves, if there is a served one inside it.

    Raises:
        TypeError: with the way to the one inside.
    """
    paths = [] if family_of(model) is not None else list(_served_inside(model))
    if paths:
        raise TypeError(
            f"{path_of(class_of(model))} is not a backbone that tokenzoo can patch, but one is wrapped in it: give "
            f"{' or '.join(paths)} instead"
        )


def _served_inside(model: nn.Module) -> Iterator[str]:
    """How to reach each served model inside one of another class: "model.visual.trunk"."""
    found = ["\n"]
    for name, module in model.named_modules():
        if name.startswith(found[-1] + "."):
            continue  # the whole is named
        if family_of(module) is not None or around_of(module) is not None:
            found.append(name)
            dotted = all(part.isidentifier() for part in name.split("."))
            yield f"model.{name}" if dotted else f"model.get_submodule({name!r})"
