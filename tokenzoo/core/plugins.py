"""Modules of a user that register methods or families, imported by name or file before a command looks any up."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path


def import_plugins(names: Iterable[str]) -> None:
    """Imports modules once each.

    Args:
        names: module names, or paths of Python files.

    Raises:
        ValueError: a file or module that is not there, or a file whose name is taken by another module.
    """
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name).resolve(), name)
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # a module that it imports itself
            raise ValueError(
                f"--import {name}: there is no such module; give the path of a Python file, or install the package"
            ) from error


def _import_file(path: Path, given: str) -> None:
    if not path.is_file():
        raise ValueError(f"--import {given}: the file does not exist")
    present = sys.modules.get(path.stem)
    if present is not None:
        if Path(getattr(present, "__file__", None) or "").resolve() == path:
            return
        raise ValueError(f"--import {given}: a module {path.stem} is there already; give the file another name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes of the file can be pickled by this name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
