"""Kept path of `tokenzoo.ops.scan_order`."""

from tokenzoo.ops.scan_order import *  # noqa: F403
