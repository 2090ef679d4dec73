"""Token maps: what a reduction does to the token axis, x' = W x, in forms that never store W.

A method decides a map; everything else (values, token mass, side data, the way back) follows from it. `matrix()` and
`membership()` write the map out densely; they are what the tests hold the fast forms against.
"""

from .base import TokenMap
from .chain import ChainMap
from .fuse import FuseMap
from .keep import KeepMap
from .merge import MergeMap
from .mix import MixMap

__all__ = ["ChainMap", "FuseMap", "KeepMap", "MergeMap", "MixMap", "TokenMap"]
