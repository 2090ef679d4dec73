"""Token maps: what a reduction does to the token axis, x' = W x, in forms that never store W.

A method decides a map; everything else (values, token mass, side data, the way back) follows from it. `matrix()` and
`membership()` write the map out densely; they are what the tests hold the fast forms against.
"""

from .assign import AssignMap, group_map
from .base import TokenMap
from .beside import BesideMap
from .chain import ChainMap
from .cluster import ClusterMap
from .fronted import FrontedMap
from .fuse import FuseMap
from .gate import GateMap
from .gated_merge import GatedMergeMap, Moves
from .keep import KeepMap
from .low_pass import Filter, LowPassMap
from .merge import MergeMap
from .mix import MixMap
from .mlerp import MlerpMap
from .note import NoteMap
from .partial import PartialMap
from .pooled import PooledMap
from .propagate import PropagateMap
from .replace import ReplaceMap
from .restore import RestoreMap
from .routed import RoutedMap
from .spread import SpreadMap
from .super_token import SuperTokenMap

__all__ = [
    "AssignMap",
    "BesideMap",
    "ChainMap",
    "ClusterMap",
    "Filter",
    "FrontedMap",
    "FuseMap",
    "GateMap",
    "GatedMergeMap",
    "KeepMap",
    "LowPassMap",
    "MergeMap",
    "MixMap",
    "MlerpMap",
    "Moves",
    "NoteMap",
    "PooledMap",
    "PropagateMap",
    "PartialMap",
    "ReplaceMap",
    "RestoreMap",
    "RoutedMap",
    "SpreadMap",
    "SuperTokenMap",
    "TokenMap",
    "group_map",
]
