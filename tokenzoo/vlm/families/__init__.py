"""Families of vision-language models of transformers, one per file; imported once a model of that package is met."""

from importlib import import_module
from pkgutil import iter_modules

from ...adapters import hf  # noqa: F401 (refuses releases of transformers that are too old)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
