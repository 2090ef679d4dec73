"""tokenzoo: token reduction for vision backbones, one call on the model you have."""

from . import methods, models
from .counting import Report, report
from .explaining import Explanation, explain
from .methods.base import Method
from .patching import (
    is_patched,
    list_backbones,
    patch_model,
    patched,
    recipe,
    unpatch_model,
    update_method,
)
from .recipes import Recipe
from .registry import create_method, list_methods, method_class, register
from .tracing import MacReport, count_macs

__version__ = "0.1.0"

# every registered class is a public name: tokenzoo.ToMe, tokenzoo.EViT, ...
_CLASSES = {method_class(name).__name__: method_class(name) for name in list_methods()}
globals().update(_CLASSES)

__all__ = [
    "Explanation",
    "MacReport",
    "Method",
    "Recipe",
    "Report",
    "count_macs",
    "create_method",
    "explain",
    "is_patched",
    "list_backbones",
    "list_methods",
    "method_class",
    "methods",
    "models",
    "patch_model",
    "patched",
    "recipe",
    "register",
    "report",
    "unpatch_model",
    "update_method",
    *_CLASSES,
]
