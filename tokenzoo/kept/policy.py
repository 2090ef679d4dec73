"""Kept path of `tokenzoo.layers.cts_policy`."""

from tokenzoo.layers.cts_policy import *  # noqa: F403
