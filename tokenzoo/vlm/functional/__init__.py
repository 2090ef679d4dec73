"""The decisions of the selectors as pure functions of rows and signals, for code that has these already.

Nothing here knows a model: scores, keys and features go in, numbers of rows (or what new rows are made of) come out, so
that a serving engine can call the same code as `tokenzoo.patch_model` does. Decisions carry no gradient and are made in
float32; of equal scores the first row counts as higher.
"""

from .coverage import catp, mmtok
from .crops import crop_shares, globalcom2
from .deciding import ranked, top
from .diversity import cdpruner, divprune, relevance, todre, vispruner
from .frequency import fourier
from .merging import Contextual, outliers, prumerge_rows, prumerge_weights, visionzip
from .ranking import fopru, hiprune, hired
from .video import Merged, density_peaks, frame_likeness, frame_windows, holitom
from .windows import merge_windows, window_likeness

__all__ = [
    "Contextual",
    "Merged",
    "catp",
    "cdpruner",
    "crop_shares",
    "density_peaks",
    "divprune",
    "fopru",
    "fourier",
    "frame_likeness",
    "frame_windows",
    "globalcom2",
    "hiprune",
    "hired",
    "holitom",
    "merge_windows",
    "mmtok",
    "outliers",
    "prumerge_rows",
    "prumerge_weights",
    "ranked",
    "relevance",
    "todre",
    "top",
    "visionzip",
    "vispruner",
    "window_likeness",
]
