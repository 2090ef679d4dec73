"""Kept path of `tokenzoo.ops.projections`."""

from tokenzoo.ops.projections import *  # noqa: F403
