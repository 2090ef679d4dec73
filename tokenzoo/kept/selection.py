"""Kept path of `tokenzoo.core.selection`."""

from tokenzoo.core.selection import *  # noqa: F403
