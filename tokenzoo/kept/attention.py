"""Kept path of `tokenzoo.ops.attention`."""

from tokenzoo.ops.attention import *  # noqa: F403
