"""A distilled tiny run that a test may change."""

import shutil

import pytest


@pytest.fixture
def copied(finished, tmp_path):
    inputs, output = finished
    return inputs, shutil.copytree(output, tmp_path / "copy")
