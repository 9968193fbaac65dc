"""What the compiler makes of the sparse kernel, read from the machine code: no GPU is needed, nor used."""

import pytest

pytest.importorskip("triton")

from test_compiled import LABEL_OUTSIDE, SPILLS, STACK

REPORT = "compile_sparse_report.py"  # for the fixtures of conftest.py


def name_of(kernel):
    names = ("arch", "student", "family", "grad", "V", "K", "ragged", "transform")
    return " ".join(str(kernel[name]) for name in names)


def test_nothing_is_spilled_and_the_registers_allow_the_programs_wanted(kernels, full):
    """A multiprocessor has 65536 registers: one program of 16 warps, two of 8 (see `choose_tile`)."""
    assert len(kernels) == (40 if full else 15)
    for kernel in kernels:
        programs = 16 // kernel["warps"]
        assert kernel["registers"] <= 65536 // (32 * kernel["warps"] * programs), name_of(kernel)
        assert kernel["local"] == 0, name_of(kernel)
        assert kernel["stack"] <= STACK, name_of(kernel)
        assert kernel["spills"] <= SPILLS, name_of(kernel)


def test_the_students_logits_and_the_gradient_move_in_128_bits(kernels):
    """Ahead of each loop and in it; of the K entries and the row's own numbers there are single words."""
    for kernel in (kernel for kernel in kernels if not kernel["ragged"]):
        accesses = dict(kernel["accesses"])
        half = kernel["student"] != "fp32"
        assert accesses.pop("LDG.128") == 2 * (1 + kernel["grad"]), name_of(kernel)
        assert (accesses.pop("STG.128", 0) > 0) == kernel["grad"], name_of(kernel)
        assert accesses.pop("LDG.64") == 1, name_of(kernel)  # the label
        blocks = max(1, kernel["K"] // (32 * kernel["warps"]))  # entries a thread
        # an entry's logit, and the label's; an entry's gradient, and the label's
        assert accesses.pop("LDG.16", 0) == half * (blocks + 1), name_of(kernel)
        assert accesses.pop("STG.16", 0) == half * kernel["grad"] * (blocks + 1), name_of(kernel)
        # log-probability and place; the first listed place and the next ones; temperature, alpha, row_scale
        words = 2 * blocks + 2 + 3 + (not half) * (blocks + 1)
        assert accesses.pop("LDG.32") == words, name_of(kernel)
        assert accesses.pop("STG.32") == 16 + (not half) * kernel["grad"] * (blocks + 1), name_of(kernel)
        assert not accesses, name_of(kernel)


def test_a_tile_is_written_without_a_barrier(kernels):
    """The one between the tiles and the entries that lie over them is outside the loop."""
    for kernel in (kernel for kernel in kernels if kernel["grad"]):
        loop = next(loop for loop in reversed(kernel["loops"]) if loop["STG"] and loop["MUFU.EX2"])
        assert loop["BAR"] == loop["SHFL"] == 0, name_of(kernel)


def test_the_second_pass_takes_two_exponentials_a_logit(kernels):
    """CE's and q's; at temperature 1, or alpha 0, one."""
    for kernel in (kernel for kernel in kernels if kernel["grad"] and not kernel["transform"]):
        loop = next(loop for loop in reversed(kernel["loops"]) if loop["STG"] and loop["MUFU.EX2"])
        assert loop["MUFU.EX2"] == 2 * kernel["vec"], name_of(kernel)


def test_a_label_or_entry_outside_the_vocabulary_fails_an_assertion_of_debug_builds_alone(kernels, debugged):
    assert {LABEL_OUTSIDE, "an entry of the teacher outside the vocabulary"} <= set(debugged["assertions"])
    assert not any(kernel["assertions"] for kernel in kernels)
