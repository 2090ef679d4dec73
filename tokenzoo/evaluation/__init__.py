"""Measuring: accuracy over the same pictures, and speed round robin. Functions that a script or a notebook calls."""

from .classification import Accuracy, Estimate, estimate, evaluate
from .data import open_pictures, read_class_map
from .environment import environment
from .loading import PictureLoader, data_config
from .plots import plot_speed
from .results import result_line, write_results
from .runs import Precision, Run
from .throughput import Speed, bench
from .timing import Spread

__all__ = [
    "Accuracy",
    "Estimate",
    "PictureLoader",
    "Precision",
    "Run",
    "Speed",
    "Spread",
    "bench",
    "data_config",
    "environment",
    "estimate",
    "evaluate",
    "open_pictures",
    "plot_speed",
    "read_class_map",
    "result_line",
    "write_results",
]
