"""Fresh random numbers in every test; see `seed` in tests/conftest.py."""

import pytest


@pytest.fixture(autouse=True)
def fresh_numbers(seed):
    return seed
