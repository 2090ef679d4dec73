"""Kept path of `tokenzoo.apply.solve`."""

from tokenzoo.apply.solve import *  # noqa: F403
