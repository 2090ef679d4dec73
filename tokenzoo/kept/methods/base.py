"""Kept path of `tokenzoo.core.method`."""

from tokenzoo.core.method import *  # noqa: F403
