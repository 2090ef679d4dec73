"""Layers that stand on their own, in the parameter layout of the models they come from."""

from .causal_conv import causal_conv1d
from .gaps import gaps_of, stretch
from .rms_norm import RMSNorm
from .scan_backends import choose_backend, scan_backend
from .selective_scan import selective_scan
from .super_token import SuperTokenAttention

__all__ = [
    "RMSNorm",
    "SuperTokenAttention",
    "causal_conv1d",
    "choose_backend",
    "gaps_of",
    "scan_backend",
    "selective_scan",
    "stretch",
]
