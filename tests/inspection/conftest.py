"""A model without weights, and records."""

import pytest
from tiny_inspection import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("inspected"))
