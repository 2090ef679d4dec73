"""Kept path of `tokenzoo.core.mixer_signals`."""

from tokenzoo.core.mixer_signals import *  # noqa: F403
