"""How much to remove in which block, as declared data; one form of schedule per file."""

from .balanced import Balanced
from .base import Schedule
from .budget import Budget, open_counts
from .cells import Cells, Grid, cells_of, scaled_cells
from .frame_share import FrameCounts, FrameShare
from .keep import Keep, check_rates, kept_of, kept_patches, quarters
from .keep_mass import KeepMass
from .keep_of_all import KeepOfAll, Kept, Slots
from .per_layer import (
    cosine_keep_rate,
    decayed_keep_rates,
    depth_shares,
    even_removal,
    keep_count,
    removed_per_layer,
    spread,
    truncated,
)
from .remove import Either, Remove, RemoveAll, half_of
from .share import Share
from .stages import Stage, Stages

__all__ = [
    "Balanced", "Budget", "Cells", "Either", "FrameCounts", "FrameShare", "Grid", "Keep", "KeepMass", "KeepOfAll",
    "Kept", "Remove", "RemoveAll", "Schedule", "Share", "Slots", "Stage", "Stages", "cells_of", "check_rates",
    "cosine_keep_rate", "decayed_keep_rates", "depth_shares", "even_removal", "half_of", "keep_count", "kept_of",
    "kept_patches", "open_counts", "quarters", "removed_per_layer", "scaled_cells", "spread", "truncated",
]  # fmt: skip
