"""Kept path of `tokenzoo.ops.rows`."""

from tokenzoo.ops.rows import *  # noqa: F403
