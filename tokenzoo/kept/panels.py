"""Kept path of `tokenzoo.view.panels`."""

from tokenzoo.view.panels import *  # noqa: F403
