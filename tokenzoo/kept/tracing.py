"""Kept path of `tokenzoo.cost.trace`."""

from tokenzoo.cost.trace import *  # noqa: F403
