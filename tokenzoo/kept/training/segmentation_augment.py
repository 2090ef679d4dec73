"""Kept path of `tokenzoo.training.segmentation.augment`."""

from tokenzoo.training.segmentation.augment import *  # noqa: F403
