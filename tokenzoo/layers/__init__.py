"""Layers that stand on their own, in the parameter layout of the models they come from."""

from .causal_conv import causal_conv1d
from .rms_norm import RMSNorm
from .scan.backends import choose_backend, scan_backend
from .scan.gaps import gaps_of, stretch
from .scan.selective_scan import selective_scan
from .segment_medoids import SegmentMedoids
from .semantic_block import SemanticBlock
from .super_token import SuperTokenAttention

__path__ += [f"{__path__[0]}/../kept/layers"]  # where modules stood that have moved

__all__ = [
    "RMSNorm",
    "SegmentMedoids",
    "SemanticBlock",
    "SuperTokenAttention",
    "causal_conv1d",
    "choose_backend",
    "gaps_of",
    "scan_backend",
    "selective_scan",
    "stretch",
]
