"""Runs and trainers with some options, on a tiny run's inputs."""

from functools import partial

import pytest
from tiny_options import inputs_of_three, run_with_options, trainer_with_options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_of_three(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run_of(inputs, tmp_path):
    return partial(run_with_options, inputs, tmp_path)


@pytest.fixture
def trainer_with(tmp_path):
    return partial(trainer_with_options, tmp_path)
