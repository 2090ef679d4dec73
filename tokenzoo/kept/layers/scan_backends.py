"""Kept path of `tokenzoo.layers.scan.backends`."""

from tokenzoo.layers.scan.backends import *  # noqa: F403
