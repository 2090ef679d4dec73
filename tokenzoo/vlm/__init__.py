"""Vision-language models with fewer visual rows in the language model: selectors, droppers, families.

Importing this package imports no transformers; families are registered when such a model is met.
"""

from . import droppers, selectors
from .base import Dropper, Selector
from .registry import list_droppers, list_selectors, register_dropper, register_selector
from .telling import ImageRows, visual_rows

__all__ = [
    "Dropper",
    "ImageRows",
    "Selector",
    "droppers",
    "list_droppers",
    "list_selectors",
    "register_dropper",
    "register_selector",
    "selectors",
    "visual_rows",
]
