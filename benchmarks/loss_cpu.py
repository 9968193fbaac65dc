"""The fused CPU loss (forward KL + CE, with gradient) is tens of times faster than eager torch and near a plain pass over its memory.

Both sides run in this process on the same tensors, in turns; the figures are medians. A plain pass reads student and teacher and
writes a gradient, and does nothing else (one fused torch.compile kernel: s + t).

    python benchmarks/loss_cpu.py [--repeats 7] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pocl_fast import reference
from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import Objective


def eager(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> None:
    """What one writes by hand: log-softmaxes in fp32, F.kl_div, F.cross_entropy, autograd."""
    tau = objective.temperature
    log_q = torch.log_softmax(student.float() / tau, -1)
    log_p = torch.log_softmax(teacher.float() / tau, -1)
    a, b = (log_q, log_p) if objective.divergence == "forward_kl" else (log_p, log_q)
    kd = torch.nn.functional.kl_div(a, b, reduction="batchmean", log_target=True)
    ce = torch.nn.functional.cross_entropy(student.float(), labels)
    (objective.alpha * ce + (1 - objective.alpha) * tau**2 * kd).backward()
    student.grad = None


def ours(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> None:
    distillation_loss(student, teacher, labels, objective).loss.backward()
    student.grad = None


def median_seconds(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Each side once to warm up, then all of them in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first size in fp32 only")
    options = parser.parse_args()
    compiled = torch.compile(eager)
    plain = torch.compile(lambda s, t: s + t)
    print(f"{torch.get_num_threads()} threads; reference terms: {', '.join(reference.Rows._fields)}")
    print(f"{'divergence':<12}{'N x V':<15}{'dtype':<10}{'ours, ms':>10}{'eager':>9}{'compile':>9}{'over a plain pass':>19}")
    for divergence in ("forward_kl", "reverse_kl"):
        objective = Objective(divergence, temperature=1.5, alpha=0.3)  # type: ignore[arg-type]
        for N, V in [(512, 49152), (192, 151936)][: 1 if options.quick else None]:
            for dtype in [torch.float32, torch.bfloat16][: 1 if options.quick else None]:
                student = torch.randn(N, V).mul_(3).to(dtype).requires_grad_(True)
                teacher = torch.randn(N, V).mul_(3).to(dtype)
                labels = torch.randint(0, V, (N,))
                arguments = (student, teacher, labels, objective)
                times = median_seconds(
                    {
                        "ours": lambda a=arguments: ours(*a),
                        "eager": lambda a=arguments: eager(*a),
                        "compile": lambda a=arguments: compiled(*a),
                        "plain": lambda s=student.detach(), t=teacher: plain(s, t),
                    },
                    options.repeats,
                )
                base = times["ours"]
                print(
                    f"{divergence:<12}{f'{N} x {V}':<15}{str(dtype)[6:]:<10}{1e3 * base:>10.1f}"
                    f"{times['eager'] / base:>8.1f}x{times['compile'] / base:>8.1f}x{base / times['plain']:>18.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
