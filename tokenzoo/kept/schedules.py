"""Kept path of `tokenzoo.core.schedule.per_layer`."""

from tokenzoo.core.schedule.per_layer import *  # noqa: F403
