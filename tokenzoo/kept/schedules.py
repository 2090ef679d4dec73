"""Kept path of `tokenzoo.core.schedule`."""

from tokenzoo.core.schedule import *  # noqa: F403
