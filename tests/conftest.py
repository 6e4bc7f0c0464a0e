"""What all rooms' tests share: they start from the same random states, whatever ran before them."""

import os
import random

import numpy as np
import pytest
import torch

from tests.processor import cap_instruction_set

cap_instruction_set()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a process a core: more threads would wait for one another


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global random states."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
