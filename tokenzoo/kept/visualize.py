"""Kept path of `tokenzoo.view.maps`."""

from tokenzoo.view.maps import *  # noqa: F403
