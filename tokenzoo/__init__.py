"""tokenzoo: token reduction for vision backbones, one call on the model you have."""

from . import methods as methods
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
from .registry import create_method, list_methods, register

__version__ = "0.1.0"
