"""Kept path of `tokenzoo.core.registry`."""

from tokenzoo.core.registry import *  # noqa: F403
