"""Kept path of `tokenzoo.core.signals`."""

from tokenzoo.core.signals import *  # noqa: F403
