"""Kept path of `tokenzoo.cost.report`."""

from tokenzoo.cost.report import *  # noqa: F403
