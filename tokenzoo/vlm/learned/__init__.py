"""Trained modules between a vision tower and a language model, in the parameter layout of their authors."""

from .token_packer import TokenPacker

__all__ = ["TokenPacker"]
