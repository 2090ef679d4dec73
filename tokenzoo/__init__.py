"""tokenzoo: token reduction for vision backbones, one call on the model you have."""

from typing import TYPE_CHECKING, Any

from . import methods, models, vlm
from .adapters import builtin, register_family  # noqa: F401 (registers the families of the package)
from .adapters.inspect import is_patched, list_backbones
from .adapters.vit.registers import add_registers, remove_registers
from .apply.expected import expected_share
from .apply.patch import patch_model, patched, recipe, unpatch_model, update_method
from .apply.released import rename_released
from .apply.saving import load, save
from .core.method import Method
from .core.recipe import Recipe
from .core.registry import create_method, list_methods, method_class, register
from .cost.report import Report, report
from .cost.trace import MacReport, count_macs
from .view.explain import Explanation, explain
from .vlm import registry as _vlm
from .vlm import visual_rows

if TYPE_CHECKING:
    from .tuning import learn_rates, tune

__version__ = "0.1.0"
__path__ += [f"{__path__[0]}/kept"]  # where modules stood that have moved

# every registered class is a public name: tokenzoo.ToMe, tokenzoo.EViT, ...
_CLASSES = {method_class(name).__name__: method_class(name) for name in list_methods()}
_CLASSES |= {c.__name__: c for c in map(_vlm.find, (*_vlm.list_selectors(), *_vlm.list_droppers()))}
globals().update(_CLASSES)


_LATER = ("learn_rates", "tune")  # what brings evaluation along is loaded when it is asked for


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from . import tuning

        globals()[name] = getattr(tuning, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "Explanation",
    "MacReport",
    "Method",
    "Recipe",
    "Report",
    "add_registers",
    "count_macs",
    "create_method",
    "expected_share",
    "explain",
    "is_patched",
    "learn_rates",
    "list_backbones",
    "list_methods",
    "load",
    "method_class",
    "methods",
    "models",
    "patch_model",
    "patched",
    "recipe",
    "register",
    "register_family",
    "remove_registers",
    "rename_released",
    "report",
    "save",
    "tune",
    "unpatch_model",
    "update_method",
    "visual_rows",
    "vlm",
    *_CLASSES,
]
