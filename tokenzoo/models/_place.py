"""Where a model's parameters are made, as timm's `create_model(device=, dtype=)` asks for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def made_on(device: Any) -> AbstractContextManager[Any]:
    """Context in which parameters are made on a device from the start, so that "meta" allocates nothing.

    Args:
        device: name or `torch.device`; None for where they would be made anyway.
    """
    return nullcontext() if device is None else torch.device(device)
