"""What the compiler makes of the dense kernel, read from the machine code: no GPU is needed, nor used."""

import pytest
from compiling import finish, start

triton = pytest.importorskip("triton")

REPORT = "compile_report.py"  # for the fixtures of conftest.py

# bytes of stack and accesses to it: the ptxas of Triton before 3.8 puts a few words there in single kernels
STACK, SPILLS = (24, 10) if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else (0, 0)

# What the mathematics asks of the special-function units, 16 operations a clock, at the speed of memory: at the floor
# of 6 bytes a logit an H100's multiprocessor passes 2.3 logits a clock. The share of that floor which must not be out
# of reach for them: with two passes, with three, and with three that take a logarithm and a quotient each. This is not
# what the kernels reach: 128 instructions a clock are the nearer bound of mixtures and TVD, at 42 to 56 % on an H200
# (benchmarks/model_gpu.py). (A polynomial instead of CE's exponential is 10 instructions and was no gain.)
WITHIN_REACH = {
    "forward_kl": 0.8,
    "reverse_kl": 0.8,
    "jsd": 0.6,
    "skew_forward_kl": 0.6,
    "skew_reverse_kl": 0.55,
    "tvd": 0.6,
}
KL = ("forward_kl", "reverse_kl")
LABEL_OUTSIDE = "label outside the student's vocabulary"


def name_of(kernel: dict) -> str:
    names = ("arch", "student", "teacher", "family", "grad", "V", "ragged", "transform")
    return " ".join(str(kernel[name]) for name in names)


def exponentials(kernel: dict) -> list[int]:
    """Of the loops over both rows, in order: normalisers, the same again where some logit is infinite, D, gradient."""
    return [loop["MUFU.EX2"] for loop in hot_loops(kernel)]


def hot_loops(kernel: dict) -> list[dict]:
    """The loops over both rows; those over entries that only the student has take an exponential or so a logit."""
    return [loop for loop in kernel["loops"] if loop["MUFU.EX2"] >= 2 * kernel["vec"]]


def test_nothing_is_spilled_and_the_registers_allow_the_programs_wanted(kernels, full):
    """A multiprocessor has 65536 registers: one program of 16 warps, two of 8 (see `choose_tile`)."""
    assert len(kernels) == (68 if full else 21)
    for kernel in kernels:
        programs = 16 // kernel["warps"]
        assert kernel["registers"] <= 65536 // (32 * kernel["warps"] * programs), name_of(kernel)
        if kernel["ragged"]:  # two words in its last tile
            assert kernel["stack"] <= max(8, STACK), name_of(kernel)
            assert kernel["spills"] <= max(4, SPILLS), name_of(kernel)
        else:
            assert kernel["local"] == 0, name_of(kernel)
            assert kernel["stack"] <= STACK, name_of(kernel)
            assert kernel["spills"] <= SPILLS, name_of(kernel)


def test_logits_and_gradient_move_in_128_bits(kernels):
    for kernel in kernels:
        accesses = dict(kernel["accesses"])
        ragged = {width: accesses.pop(width, 0) for width in ("LDG.16", "STG.16")}
        half = kernel["student"] != "fp32"
        assert accesses.pop("LDG.64") == 1, name_of(kernel)  # the label
        # temperature, alpha, row_scale; and the label's logit, which is a half's 16 bits otherwise
        assert accesses.pop("LDG.32") == 3 + (not half), name_of(kernel)
        assert accesses.pop("STG.32") == 16, name_of(kernel)  # seven stats and the loss, and zeros of an ignored row
        passes = 2 + (kernel["family"] not in KL or not kernel["grad"]) + kernel["grad"]
        assert accesses.pop("LDG.128") >= 2 * 2 * passes, name_of(kernel)  # ahead of each loop and in it
        assert accesses.pop("STG.128", 0) >= 2 * kernel["grad"], name_of(kernel)
        assert not accesses, name_of(kernel)
        if not kernel["ragged"]:
            assert ragged == {"LDG.16": int(half), "STG.16": 0}, name_of(kernel)


def test_a_vocabulary_that_is_no_multiple_of_16_is_still_read_in_128_bits_where_its_rows_are_aligned(kernels):
    """Each pass has its vector accesses, and one branch, taken in the last tile, for the logits that fill none."""
    for kernel in (kernel for kernel in kernels if kernel["ragged"]):
        for loop in hot_loops(kernel):
            assert loop["LDG"] == 2 * (1 + kernel["vec"]), name_of(kernel)
        assert kernel["accesses"]["STG.16"] == 4 * kernel["vec"], name_of(
            kernel
        )  # zeros, tail, and two of the gradient


def test_a_lane_sums_without_the_others(kernels):
    """No barrier and no exchange between threads inside any loop, but where a gradient of 32 bytes a thread is written:
    the student is fp32, the teacher half."""
    for kernel in kernels:
        *others, last = hot_loops(kernel)
        assert all(loop["BAR"] == loop["SHFL"] == 0 for loop in others), name_of(kernel)
        wide = kernel["grad"] and kernel["student"] == "fp32" != kernel["teacher"]
        assert (last["BAR"], last["SHFL"]) == (2 if wide else 0, 0), name_of(kernel)


def test_exponentials_a_logit_are_those_of_the_mathematics(kernels):
    """CE, q and p, and three a lane to move the sums to a new maximum; the larger of p and q, and their ratio; CE, q,
    and p or the ratio. (At temperature 1, or alpha 0, CE's are branched around.)"""
    for kernel in (kernel for kernel in kernels if not kernel["transform"]):
        vec = kernel["vec"]
        expected = [3 * vec + 3, 3 * vec + 3]
        if kernel["family"] not in KL or not kernel["grad"]:
            expected.append(2 * vec)
        if kernel["grad"]:
            expected.append(2 * vec if kernel["family"] == "tvd" else 3 * vec)
        assert exponentials(kernel) == expected, name_of(kernel)


def test_the_special_function_units_are_not_what_bounds_the_speed(kernels):
    for kernel in (kernel for kernel in kernels if kernel["student"] == "bf16" and kernel["grad"]):
        if kernel["transform"]:
            continue
        normalisers, _, *others = hot_loops(kernel)
        # a logarithm has two forms, for near distributions and others, of which a row takes one
        operations = [loop["MUFU.EX2"] + loop["MUFU.LG2"] / 2 + loop["MUFU.RCP"] for loop in (normalisers, *others)]
        allowed = 16 / (2.3 * WITHIN_REACH[kernel["family"]])
        assert sum(operations) / kernel["vec"] <= allowed, name_of(kernel)


def test_a_label_outside_the_vocabulary_fails_an_assertion_of_debug_builds_alone(kernels, debugged):
    assert LABEL_OUTSIDE in debugged["assertions"]
    assert not any(kernel["assertions"] for kernel in kernels)


def test_nothing_but_the_family_and_the_dtype_compiles_another_kernel(tmp_path):
    """Of the row kernels, and of the one that scales a gradient, which has no family."""
    reports = {report.pop("kernel"): report for report in finish(start("specialisation_report.py", tmp_path))}
    assert list(reports) == ["dense", "sparse", "scale"]
    for kernel, report in reports.items():
        compiling = {name: report.pop(name) for name in ("divergence", "dtype") if name in report}
        assert compiling == ({"dtype": 2} if kernel == "scale" else {"divergence": 2, "dtype": 2}), kernel
        assert set(report.values()) == {1}, (kernel, report)


def test_scaling_a_gradient_moves_it_in_128_bits_and_spills_nothing(tmp_path):
    """16 elements a thread, 8 warps a program, eight programs a multiprocessor."""
    kernels = finish(start("compile_scale_report.py", tmp_path))
    assert [kernel["dtype"] for kernel in kernels] == ["bf16", "fp16", "fp32"]
    for kernel in kernels:
        moves = 16 // kernel["vec"]
        assert kernel["accesses"] == {"LDG.32": 1, "LDG.128": moves, "STG.128": moves}, kernel  # the factor first
        assert kernel["registers"] <= 65536 // (32 * kernel["warps"] * 8), kernel
        assert kernel["stack"] == kernel["local"] == kernel["spills"] == 0, kernel
