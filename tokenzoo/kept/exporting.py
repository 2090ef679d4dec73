"""Kept path of `tokenzoo.apply.export`."""

from tokenzoo.apply.export import *  # noqa: F403
