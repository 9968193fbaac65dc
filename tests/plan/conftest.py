"""Inputs of a tiny run, and a run on them that keeps its checkpoints."""

import pytest
from tiny_plan import by_tokens
from tiny_run import make_inputs, run

from pocl_fast.run import train_step


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def kept(inputs, tmp_path_factory):
    """A run by tokens, in two stages of two passes, that keeps its checkpoints to the end."""
    output, words = tmp_path_factory.mktemp("kept") / "run", by_tokens(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "checkpoints", lambda _: [])  # which it deletes
        assert run("distill", output, *words) == 0
    return output
