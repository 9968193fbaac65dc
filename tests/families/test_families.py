"""Every family of causal language models that the installed transformers has: run right, or refused in one sentence.

Each cell compares with transformers' own logits, in eager attention, of each sample by itself (see cells.py). A family
may be packed or padded. It may be refused by an `InputError`. It is never silently wrong, and never a traceback.
"""

import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from families.alone import pristine
from families.cells import CELLS
from families.page import LEFT_OUT
from families.tiny_families import NotTiny, families, rows, runnable_model
from pocl_fast.system.errors import InputError

ALWAYS = ("gemma2", "gpt2", "gpt_oss", "lfm2", "llama", "mamba2")  # in `make test` too
TIMEOUT = 60  # seconds
MOST_LEFT_OUT = 8  # of the 196 families of transformers 5.24 it is 5


def row(name):
    return pytest.param(name, marks=pytest.mark.families(always=name in ALWAYS))


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("name", [row(name) for name in rows()])
def test_family(name, cell, outcome, time_limit, little_to_collect):
    warnings.simplefilter("ignore")
    with time_limit(TIMEOUT):
        try:
            pristine(name)
        except NotTiny as reason:
            outcome(name, LEFT_OUT, str(reason))
            return
        try:
            outcome(name, cell, CELLS[cell](name))
        except InputError as refusal:
            said = str(refusal)
            assert "\n" not in said.strip()
            outcome(name, cell, "refused", said)


@pytest.mark.families
def test_few_families_cannot_be_built_tiny():
    left_out = {}
    for name in families():
        try:
            runnable_model(name)
        except NotTiny as reason:
            left_out[name] = str(reason)
    assert len(left_out) <= MOST_LEFT_OUT, left_out


@pytest.mark.families(always=True)
def test_the_page_of_families_lists_every_row_of_the_version_that_it_names():
    page = (Path(__file__).resolve().parents[2] / "docs/families.md").read_text(encoding="utf-8")
    if f"transformers {version('transformers')}" not in page:
        pytest.skip("docs/families.md is of another version of transformers")
    listed = {line.split()[1].rstrip(":") for line in page.splitlines() if line.startswith(("| ", "- "))}
    assert set(rows()) - listed == set()
