"""The fused CPU loss with gradient is 37 to 126 times as fast as eager torch, 9 to 53 times torch.compile (AVX-512).

All sides run in this process on the same tensors, in turns, forward and backward; the figures are medians of time over
ours. "by hand" is what one writes without a library, on log-softmaxes in fp32; "published" takes the steps of the
DistiLLM and POCL code (softmaxes, a mask of infinities, products, sums), which leaves constants of the teacher out of
some losses; "compiled" is torch.compile of "by hand". "plain" reads both logits and writes as many bytes past the
caches on as many threads: the least that any loss can do. A last table gives the peak of resident memory beyond the
inputs and the gradient, each side in a process of its own.

    python benchmarks/loss_cpu.py [--families forward_kl,jsd] [--repeats 5] [--quick] [--no-memory]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

TEMPERATURE, ALPHA = 1.33, 0.3
SIZES = [(512, 49152), (256, 151936), (192, 151936)]
DTYPES = (torch.float32, torch.bfloat16)
MOST_ERROR = {
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
}  # of the gradient in norm; bf16: the rounding of the output alone
ERROR_ROWS = 32
MOST_MEMORY = 4.0  # MiB a thread, of ours beyond inputs and gradient
QUIET = 0.03  # share of the machine's processors that other programs may have in a turn that counts
Loss = Callable[[Tensor, Tensor, Tensor, Objective], Tensor]

# streaming stores, so that the written lines are not read first; 16 bytes each, which fill a line four at a time
PLAIN_SOURCE = """
#include <emmintrin.h>
#include <cstdint>
#include <thread>
#include <vector>
extern "C" void plain(const __m128i* a, const __m128i* b, __m128i* out, std::int64_t count, int threads) {
    auto part = [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            _mm_stream_si128(out + i, _mm_xor_si128(_mm_loadu_si128(a + i), _mm_loadu_si128(b + i)));
        _mm_sfence();
    };
    std::vector<std::thread> others;
    for (int k = 1; k < threads; ++k) others.emplace_back(part, count * k / threads, count * (k + 1) / threads);
    part(0, count / threads);
    for (auto& other : others) other.join();
}
"""


def ours(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    return distillation_loss(student, teacher, labels, objective, backend="cpp").loss


def by_hand(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """What one writes without a library; the mean over tokens."""
    tau, alpha, share = objective.temperature, objective.alpha, objective.teacher_share
    s = student.float()  # once, so that both terms' gradients meet in fp32
    log_q = torch.log_softmax(s if tau == 1 else s / tau, -1)
    log_p = torch.log_softmax(teacher.float() if tau == 1 else teacher.float() / tau, -1)

    def kl(log_of: Tensor, log_from: Tensor) -> Tensor:
        return F.kl_div(log_from, log_of, reduction="batchmean", log_target=True)

    def mixture() -> Tensor:
        return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))

    family = objective.family
    if family == "forward_kl":
        D = kl(log_p, log_q)
    elif family == "reverse_kl":
        D = kl(log_q, log_p)
    elif family == "jsd":
        log_m = mixture()
        D = share * kl(log_p, log_m) + (1 - share) * kl(log_q, log_m)
    elif family == "skew_forward_kl":
        D = kl(log_p, mixture())
    elif family == "skew_reverse_kl":
        D = kl(log_q, mixture())
    elif family == "tvd":
        D = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    else:
        raise ValueError(f"by_hand does not know {family!r}")
    D = tau**objective.temperature_power * D
    return D if alpha == 0 else alpha * F.cross_entropy(s, labels) + (1 - alpha) * D


def published(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """The steps of the published code, which leave Σ p log p out of forward KL and skew forward KL."""
    tau, alpha, share, family = objective.temperature, objective.alpha, objective.teacher_share, objective.family
    s, t = student / tau, teacher / tau
    infinite = student.isinf() | teacher.isinf()

    def softmax(x: Tensor) -> Tensor:
        return F.softmax(x, -1, dtype=torch.float32)

    def log_softmax(x: Tensor) -> Tensor:
        return F.log_softmax(x, -1, dtype=torch.float32)

    def summed(terms: Tensor) -> Tensor:
        return terms.masked_fill(infinite, 0).sum(-1)

    def log_mixture(p: Tensor, q: Tensor) -> Tensor:
        return (share * p + (1 - share) * q).log()

    if family == "forward_kl":
        rows = -summed(softmax(t) * log_softmax(s))
    elif family == "reverse_kl":
        q = softmax(s)
        rows = summed(q * log_softmax(s)) - summed(q * log_softmax(t))
    elif family == "jsd":
        p, q = softmax(t), softmax(s)
        log_m = log_mixture(p, q)
        rows = share * (summed(p * log_softmax(t)) - summed(p * log_m))
        rows = rows + (1 - share) * (summed(q * log_softmax(s)) - summed(q * log_m))
    elif family == "skew_forward_kl":
        p = softmax(t)
        rows = -summed(p * log_mixture(p, softmax(s)))
    elif family == "skew_reverse_kl":
        q = softmax(s)
        rows = summed(q * log_softmax(s)) - summed(q * log_mixture(softmax(t), q))
    elif family == "tvd":
        rows = 0.5 * summed((softmax(t) - softmax(s)).abs())
    else:
        raise ValueError(f"published does not know {family!r}")
    D = tau**objective.temperature_power * rows.mean()
    return alpha * F.cross_entropy(student.float(), labels) + (1 - alpha) * D


def step(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> None:
    """Forward and backward once. Frees its gradient itself: left to the next side, that would be part of its time."""
    loss(student, teacher, labels, objective).backward()
    student.grad = None


def tensors(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits that want a gradient, teacher logits, labels."""
    student = torch.randn(N, V).mul_(3).to(dtype).requires_grad_(True)
    return student, torch.randn(N, V).mul_(3).to(dtype), torch.randint(0, V, (N,))


def plain_pass() -> tuple[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """What it is, and a function that reads two tensors and writes a third of their size."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "plain.cpp"), Path(folder, "plain.so")
        source.write_text(PLAIN_SOURCE, encoding="utf-8")
        command = [compiler or "c++", "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", source, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).plain  # stays loaded without its file
        except (OSError, subprocess.CalledProcessError):  # no compiler, or not x86
            return "torch.add into a tensor that is there", lambda a, b, out: (torch.add(a, b, out=out), None)[1]
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
    function.restype = None

    def run(a: Tensor, b: Tensor, out: Tensor) -> None:
        bytes_each = out.numel() * out.element_size()
        function(a.data_ptr(), b.data_ptr(), out.data_ptr(), bytes_each // 16, torch.get_num_threads())

    return "both read, streaming stores", run


def busy_seconds() -> float:
    """Processor time that all programs of the machine have used since it started."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split(None, 4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def median_seconds(contenders: dict[str, Callable[[], None]], repeats: int) -> tuple[dict[str, float], float]:
    """Each side once to warm up, then all of them in turns; and the share of the machine that other programs had.

    A program beside this one slows the sides unequally: the shorter a side, the more a lost time slice is of it. So
    turns in which others ran do not count, where enough others follow in which they did not.
    """
    turns: list[tuple[float, dict[str, float]]] = []
    for number in range(1 + 3 * repeats):
        times = {}
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        for name, side in contenders.items():
            begin = time.perf_counter()
            side()
            times[name] = time.perf_counter() - begin
        others = busy_seconds() - busy - (time.process_time() - own)
        if number:
            turns.append((max(0.0, others / (time.perf_counter() - start) / (os.cpu_count() or 1)), times))
        if sum(share <= QUIET for share, _ in turns) == repeats:
            break
    counted = sorted(turns, key=lambda turn: turn[0])[:repeats]
    medians = {name: statistics.median(times[name] for _, times in counted) for name in contenders}
    return medians, counted[-1][0]


def gradient_error(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> float:
    """|ours - exact| / |exact| in norm over some rows, exact being the reference's in float64."""
    gradients = []
    for dtype, backend in ((student.dtype, "cpp"), (torch.float64, "reference")):
        s = student[:ERROR_ROWS].detach().to(dtype).requires_grad_(True)
        t = teacher[:ERROR_ROWS].to(dtype)
        distillation_loss(s, t, labels[:ERROR_ROWS], objective, backend=backend).loss.backward()  # type: ignore[arg-type]
        assert s.grad is not None
        gradients.append(s.grad.double())
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def resident_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS is the resident set now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def extra_peaks(side: str, N: int, V: int, dtype: torch.dtype, families: list[str], threads: int) -> list[float]:
    """For each family the peak of resident memory beyond inputs and gradient, MiB. Runs in a process of its own.

    Beyond what was resident before the first step of that size, so that scratch memory which stays counts; for
    "compiled", whose compiler leaves much behind that is not the loss's, before the second.
    """
    torch.set_num_threads(threads)
    trim = ctypes.CDLL(None).malloc_trim
    small, inputs = tensors(2, 64, dtype), tensors(N, V, dtype)
    loss = {"ours": ours, "by hand": by_hand, "published": published, "compiled": by_hand}[side]
    step(loss, *small, Objective(alpha=ALPHA))  # libraries loaded, threads started
    gc.collect()
    trim(0)
    before, peaks = resident_bytes("VmRSS"), []
    for family in families:
        objective = Objective(family, temperature=TEMPERATURE, alpha=ALPHA)  # type: ignore[arg-type]
        if side == "compiled":
            torch._dynamo.reset()
            loss = torch.compile(by_hand)
            step(loss, *inputs, objective)
        gc.collect()
        trim(0)
        if side == "compiled":
            before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
        step(loss, *inputs, objective)
        gradient = inputs[0].numel() * inputs[0].element_size()
        peaks.append((resident_bytes("VmHWM") - before - gradient) / 2**20)
    return peaks


def print_times(families: list[str], sizes: list[tuple[int, int]], repeats: int) -> None:
    description, plain = plain_pass()
    print(
        f"time over ours; plain: {description}; error: the gradient's against float64, in norm; others: share of the"
        " machine that other programs had"
    )
    print(
        "{:<17}{:<14}{:<10}{:>9}{:>10}{:>12}{:>10}{:>8}{:>9}{:>8}".format(
            "divergence", "N x V", "dtype", "ours", "by hand", "published", "compiled", "plain", "error", "others"
        )
    )
    for family in families:
        objective = Objective(family, temperature=TEMPERATURE, alpha=ALPHA)  # type: ignore[arg-type]
        for N, V in sizes:
            for dtype in DTYPES:
                torch._dynamo.reset()  # each size compiled for itself
                inputs = tensors(N, V, dtype)
                student, teacher, written = inputs[0].detach(), inputs[1], torch.zeros_like(inputs[1])
                losses: dict[str, Loss] = {"ours": ours, "by hand": by_hand, "published": published}
                losses["compiled"] = torch.compile(by_hand)
                sides = {name: lambda f=f, i=inputs, o=objective: step(f, *i, o) for name, f in losses.items()}
                sides["plain"] = lambda s=student, t=teacher, w=written: plain(s, t, w)
                times, others = median_seconds(sides, repeats)  # type: ignore[arg-type]
                error = gradient_error(*inputs, objective)
                row = f"{family:<17}{f'{N} x {V}':<14}{str(dtype)[6:]:<10}{1e3 * times['ours']:>6.1f} ms"
                ratios = [times[name] / times["ours"] for name in ("by hand", "published", "compiled", "plain")]
                row += "{:>9.1f}x{:>11.1f}x{:>9.1f}x{:>7.2f}x".format(*ratios)
                print(f"{row}{error:>9.1e}{others:>8.0%}", flush=True)
                if not error <= MOST_ERROR[dtype]:
                    raise SystemExit(f"the gradient's error of {error:.1e} is above {MOST_ERROR[dtype]:.0e}")


def print_memory(families: list[str], sizes: list[tuple[int, int]]) -> None:
    sides, threads = ("ours", "by hand", "published", "compiled"), torch.get_num_threads()
    print(f"\npeak resident memory beyond inputs and gradient, MiB, {threads} threads in all")
    print("{:<17}{:<14}{:<10}{:>9}{:>10}{:>12}{:>10}".format("divergence", "N x V", "dtype", *sides))
    for N, V in sizes:
        for dtype in DTYPES:
            columns = []
            for side in sides:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    columns.append(pool.submit(extra_peaks, side, N, V, dtype, families, threads).result())
            for family, row in zip(families, zip(*columns, strict=True), strict=True):
                print(f"{family:<17}{f'{N} x {V}':<14}{str(dtype)[6:]:<10}", end="")
                print("{:>9.1f}{:>10.1f}{:>12.1f}{:>10.1f}".format(*row), flush=True)
                if row[0] > MOST_MEMORY * threads:
                    raise SystemExit(f"ours took {row[0]:.1f} MiB, more than {MOST_MEMORY} a thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(DIVERGENCES), help="divergences, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first of the divergences and sizes only")
    parser.add_argument("--no-memory", action="store_true", help="leave the table of peak memory out")
    options = parser.parse_args()
    quick = 1 if options.quick else None
    families, sizes = options.families.split(",")[:quick], SIZES[:quick]
    if unknown := set(families) - set(DIVERGENCES):
        parser.error(f"no divergence {', '.join(sorted(unknown))}; there are {', '.join(DIVERGENCES)}")
    print(f"{torch.get_num_threads()} threads, temperature {TEMPERATURE}, alpha {ALPHA}; forward and backward")
    print_times(families, sizes, options.repeats)
    if not options.no_memory:
        print_memory(families, sizes)


if __name__ == "__main__":
    main()
