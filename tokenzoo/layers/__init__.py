"""Layers that stand on their own, in the parameter layout of the models they come from."""

from .super_token import SuperTokenAttention

__all__ = ["SuperTokenAttention"]
