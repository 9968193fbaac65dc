"""A stand-in for the GPU's flash attention, for the tests of packed rows."""

import pytest
from tiny_packed import varlen_by_its_documentation

from pocl_fast.models import packed_attention


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    monkeypatch.setattr(packed_attention, "_takes_flash", lambda value, dropout: True)
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: varlen_by_its_documentation)
