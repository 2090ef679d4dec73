"""Kept path of `tokenzoo.ops.matching.bipartite`."""

from tokenzoo.ops.matching.bipartite import *  # noqa: F403
