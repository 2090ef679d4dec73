"""Backbone families. An adapter says where the halves of a block are; it never names a method.

The names here are all that a family from outside needs, see docs/backbones.md.
"""

from ..core.method import BlockShape
from ..core.tokens import Layout, Tokens
from ..ops.attention import Heads
from .attending import AttentionLayer
from .backbone import Around, Family
from .block import BlockMacs, ReducingBlock
from .features import Reads
from .model import ReducingModel
from .registry import register_family
from .walk import Walk

__all__ = [
    "Around",
    "AttentionLayer",
    "BlockMacs",
    "BlockShape",
    "Family",
    "Heads",
    "Layout",
    "Reads",
    "ReducingBlock",
    "ReducingModel",
    "Tokens",
    "Walk",
    "register_family",
]
