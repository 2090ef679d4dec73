"""Kept path of `tokenzoo.evaluation.segmentation.overlay`."""

from tokenzoo.evaluation.segmentation.overlay import *  # noqa: F403
