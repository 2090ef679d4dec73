"""Measuring: accuracy and mIoU over the same images, and speed round robin. For scripts and notebooks."""

from .classification import Accuracy, Estimate, estimate, evaluate
from .data import open_pictures, read_class_map
from .environment import environment
from .loading import PictureLoader, data_config
from .plots import plot_speed
from .results import result_line, write_results
from .runs import Precision, Run
from .segmentation.data import open_dataset
from .segmentation.evaluate import evaluate_segmentation
from .segmentation.inference import Inference, Predictor
from .throughput import Speed, bench
from .timing import Spread

__path__ += [f"{__path__[0]}/../kept/evaluation"]  # where modules stood that have moved

__all__ = [
    "Accuracy",
    "Estimate",
    "Inference",
    "PictureLoader",
    "Precision",
    "Predictor",
    "Run",
    "Speed",
    "Spread",
    "bench",
    "data_config",
    "environment",
    "estimate",
    "evaluate",
    "evaluate_segmentation",
    "open_dataset",
    "open_pictures",
    "plot_speed",
    "read_class_map",
    "result_line",
    "write_results",
]
