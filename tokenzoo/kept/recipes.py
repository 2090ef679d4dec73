"""Kept path of `tokenzoo.core.recipe`."""

from tokenzoo.core.recipe import *  # noqa: F403
