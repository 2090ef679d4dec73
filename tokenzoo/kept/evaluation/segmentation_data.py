"""Kept path of `tokenzoo.evaluation.segmentation.data`."""

from tokenzoo.evaluation.segmentation.data import *  # noqa: F403
