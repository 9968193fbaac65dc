"""In what precision matrix products are computed."""

import pytest
import torch

from pocl_fast.models.precision import Precision, choose_precision, exact_products


def test_precision_on_a_cpu_is_what_was_asked_for_and_autocast_is_off():
    chosen = choose_precision("fp32", torch.device("cpu"))
    assert chosen.name == "fp32"
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("rounds", [False, True])
def test_fp32_products_on_a_cpu_are_exact_by_whichever_library_is_faster(monkeypatch, rounds):
    if rounds:  # as with AMX
        monkeypatch.setattr("pocl_fast.models.precision.rounds_to_bf16", lambda: True)
    choose_precision("fp32", torch.device("cpu"))
    a, b = torch.randn(2, 300, 300)
    want = a.double() @ b.double()
    assert ((a @ b).double() - want).norm() < 1e-6 * want.norm()
    if rounds:
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_a_frozen_model_computes_in_bf16_only_where_that_was_chosen_and_is_in_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        assert Precision("bf16", cpu).frozen_dtype == (torch.bfloat16 if supported else torch.float32)
    assert Precision("fp32", cpu).frozen_dtype == Precision("bf16", torch.device("cuda")).frozen_dtype == torch.float32


def test_attentions_products_are_exact_within_their_block_and_the_mode_comes_back():
    choose_precision("bf16", torch.device("cpu"))
    try:
        with exact_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        choose_precision("fp32", torch.device("cpu"))
