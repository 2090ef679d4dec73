"""Random numbers that depend on names, not on what was drawn before: a run that goes on draws what it would have."""

from __future__ import annotations

import random

import numpy as np
import torch

MODEL, METHOD, ORDER, PICTURE, BATCH, STRENGTH, VIEWS = range(7)  # what the numbers are for


def seed_of(*parts: int) -> int:
    """A 63-bit seed from whole numbers of at least 0; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*parts: int) -> None:
    """Seeds `random`, numpy and torch on all devices."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_host(*parts: int) -> None:
    """Seeds `random`, numpy and torch's generator of the CPU, which is all that augmentation draws from."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
