"""Every family of causal language models that the installed transformers has: run right, or refused in one sentence.

Each cell compares with transformers' own logits, in eager attention, of each sample by itself (see cells.py). A family
may be packed or padded. It may be refused by an `InputError`. It is never silently wrong, and never a traceback.
"""

import warnings

import pytest
import torch

from families.cells import CELLS
from families.tiny_families import NOT_TINY, families, row_model, rows
from pocl_fast.system.errors import InputError

ALWAYS = ("gemma2", "gpt2", "gpt_oss", "lfm2", "llama", "mamba2")  # in `make test` too
TIMEOUT = 60  # seconds


def row(name):
    return pytest.param(name, marks=pytest.mark.families(always=name in ALWAYS))


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("name", [row(name) for name in rows() if name not in NOT_TINY])
def test_family(name, cell, outcome, time_limit, little_to_collect):
    warnings.simplefilter("ignore")
    with time_limit(TIMEOUT):
        try:
            outcome(name, cell, CELLS[cell](name))
        except InputError as refusal:
            said = str(refusal)
            assert "\n" not in said.strip()
            outcome(name, cell, "refused", said)


@pytest.mark.families(always=True)
def test_few_families_cannot_be_built_tiny():
    assert set(NOT_TINY) <= set(families())
    assert len(NOT_TINY) <= 0.05 * len(families())


@pytest.mark.families
@pytest.mark.parametrize("name", sorted(NOT_TINY))
def test_a_family_that_is_left_out_cannot_be_built_or_run(name, outcome):
    outcome(name, "left out", NOT_TINY[name])
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever transformers raises
        row_model(name)(input_ids=torch.ones(1, 40, dtype=torch.int64))
