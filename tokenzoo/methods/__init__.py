"""The methods of the zoo, one a file. Importing this package registers them."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    if not _module.name.startswith("_") and _module.name != "base":
        import_module(f"{__name__}.{_module.name}")
