"""The fused CPU loss (KL + CE, with gradient) is over 10 times as fast as eager torch, and over 2 times torch.compile.

All sides run in this process on the same tensors, in turns; the figures are medians of time over ours. "reference" is
pocl_fast/reference.py with autograd, which also gives the metrics; "by hand" is F.kl_div and F.cross_entropy on
log-softmaxes, without them; "compiled" is torch.compile of the latter. A plain pass reads both logits and writes a
buffer that is already there: the least any loss can do.

    python benchmarks/loss_cpu.py [--repeats 5] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import DIVERGENCES, Objective

TEMPERATURE, ALPHA = 1.33, 0.3


def by_hand(student: Tensor, teacher: Tensor, labels: Tensor, divergence: str) -> Tensor:
    """What one writes without a library: log-softmaxes in fp32, kl_div, cross_entropy."""
    log_q = torch.log_softmax(student.float() / TEMPERATURE, -1)
    log_p = torch.log_softmax(teacher.float() / TEMPERATURE, -1)
    first, second = (log_q, log_p) if divergence == "forward_kl" else (log_p, log_q)
    kd = F.kl_div(first, second, reduction="batchmean", log_target=True)
    return ALPHA * F.cross_entropy(student.float(), labels) + (1 - ALPHA) * TEMPERATURE**2 * kd


def sides(
    N: int, V: int, dtype: torch.dtype, divergence: str, compiled: Callable[..., Tensor]
) -> dict[str, Callable[[], None]]:
    """Each side as a function that runs forward and backward once."""
    student = torch.randn(N, V).mul_(3).to(dtype).requires_grad_(True)
    teacher = torch.randn(N, V).mul_(3).to(dtype)
    labels = torch.randint(0, V, (N,))
    objective = Objective(divergence, temperature=TEMPERATURE, alpha=ALPHA)  # type: ignore[arg-type]
    written = torch.zeros_like(teacher)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss().backward()

        return run

    return {
        "ours": step(lambda: distillation_loss(student, teacher, labels, objective).loss),
        "reference": step(lambda: distillation_loss(student, teacher, labels, objective, backend="reference").loss),
        "by hand": step(lambda: by_hand(student, teacher, labels, divergence)),
        "compiled": step(lambda: compiled(student, teacher, labels, divergence)),
        "plain": lambda: (torch.add(student.detach(), teacher, out=written), None)[1],
    }


def median_seconds(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Each side once to warm up, then all of them in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, side in contenders.items():
            start = time.perf_counter()
            side()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="forward KL at the first size only")
    options = parser.parse_args()
    compiled = torch.compile(by_hand)
    print(f"{torch.get_num_threads()} threads, temperature {TEMPERATURE}, alpha {ALPHA}; forward and backward")
    print(
        "{:<12}{:<14}{:<10}{:>9}{:>12}{:>10}{:>10}{:>8}".format(
            "divergence", "N x V", "dtype", "ours", "reference", "by hand", "compiled", "plain"
        )
    )
    for divergence in DIVERGENCES[: 1 if options.quick else None]:
        for N, V in [(512, 49152), (192, 151936)][: 1 if options.quick else None]:
            for dtype in (torch.float32, torch.bfloat16):
                times = median_seconds(sides(N, V, dtype, divergence, compiled), options.repeats)
                ours = times["ours"]
                ratios = [times[name] / ours for name in ("reference", "by hand", "compiled", "plain")]
                row = f"{divergence:<12}{f'{N} x {V}':<14}{str(dtype)[6:]:<10}{1e3 * ours:>6.1f} ms"
                print(row + "{:>11.1f}x{:>9.1f}x{:>9.1f}x{:>7.2f}x".format(*ratios), flush=True)


if __name__ == "__main__":
    main()
