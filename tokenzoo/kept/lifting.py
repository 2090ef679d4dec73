"""Kept path of `tokenzoo.core.lift`."""

from tokenzoo.core.lift import *  # noqa: F403
