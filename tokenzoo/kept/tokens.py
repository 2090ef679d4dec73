"""Kept path of `tokenzoo.core.tokens`."""

from tokenzoo.core.tokens import *  # noqa: F403
