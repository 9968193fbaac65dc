"""Fresh random numbers in every run; the seed is printed with a failing test, and POCL_TEST_SEED repeats it."""

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    value = int(os.environ.get("POCL_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"POCL_TEST_SEED={value}")
    torch.manual_seed(value)
    return value
