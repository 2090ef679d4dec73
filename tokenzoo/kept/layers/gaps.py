"""Kept path of `tokenzoo.layers.scan.gaps`."""

from tokenzoo.layers.scan.gaps import *  # noqa: F403
