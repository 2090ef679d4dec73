import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """What fixtures of a module draw does not depend on the tests before."""
    _seed()


@pytest.fixture(autouse=True)
def seeded(seeded_module):
    """What a test draws without a generator of its own depends on nothing but the test."""
    _seed()
