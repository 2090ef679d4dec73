"""Kept path of `tokenzoo.evaluation.segmentation.inference`."""

from tokenzoo.evaluation.segmentation.inference import *  # noqa: F403
