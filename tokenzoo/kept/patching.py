"""Kept path of `tokenzoo.apply.patch`."""

from tokenzoo.apply.patch import *  # noqa: F403
