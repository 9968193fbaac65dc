"""What the compiler makes of the dense kernel where it pipelines its loops, read from the machine code: no GPU is
needed, nor used."""

import pytest

pytest.importorskip("triton")

from test_compiled import KL, SPILLS, STACK, hot_loops

pytestmark = pytest.mark.full  # no tile in use reads ahead so: benchmarks/sweep_gpu.py tries them
REPORT = "compile_stages_report.py"  # for the fixtures of conftest.py


def name_of(kernel):
    return " ".join(str(kernel[name]) for name in ("student", "family", "stages", "V"))


def passes(kernel):
    """Normalisers, the same again where some logit is infinite, D where that is a pass of its own, gradient."""
    return 3 if kernel["family"] in KL else 4


def test_nothing_is_spilled_and_the_registers_allow_the_programs_wanted(kernels, full):
    assert len(kernels) == (6 if full else 4)
    for kernel in kernels:
        assert kernel["registers"] <= 65536 // 512, name_of(kernel)
        assert kernel["local"] == 0, name_of(kernel)
        assert kernel["stack"] <= STACK, name_of(kernel)
        assert kernel["spills"] <= SPILLS, name_of(kernel)


def test_every_pass_copies_both_rows_asynchronously_in_128_bits(kernels):
    """Of each row all but one of its stages ahead of the loop, and one a turn: so many tiles are in shared memory."""
    for kernel in kernels:
        copies = {name: count for name, count in kernel["accesses"].items() if name.startswith("LDGSTS")}
        assert copies == {"LDGSTS.128": 2 * kernel["stages"] * passes(kernel)}, name_of(kernel)
        tile = 16 * 32 * kernel["warps"]  # bytes: 16 a thread
        assert kernel["shared"] == 2 * (kernel["stages"] - 1) * tile, name_of(kernel)


def test_a_turn_waits_for_all_threads_twice_and_reads_nothing_else(kernels):
    """Once for the tiles to be there, once before others take their places. What of a ragged last tile fills no vector
    is read one by one, behind branches that put one more barrier between the two rows."""
    for kernel in kernels:
        loops = hot_loops(kernel)
        assert len(loops) == passes(kernel), name_of(kernel)
        for loop in loops:
            assert (loop["BAR"], loop["SHFL"]) == (2 + kernel["ragged"], 0), name_of(kernel)
            assert loop["LDGSTS"] == 2, name_of(kernel)
            assert loop["LDG"] == 2 * kernel["ragged"] * kernel["vec"], name_of(kernel)
