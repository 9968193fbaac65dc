"""The fused linear loss takes an eighth of the time and a tenth of the memory of logits and a loss by hand.

1024 of 4096 tokens are supervised; student and teacher in bf16, both with their gradients off but for the student's
hidden states and lm_head. "by hand" multiplies every token, as a model's forward does, and takes log-softmaxes in fp32;
"by hand, supervised" selects the tokens first. For cross-entropy alone the other side is torch's
`linear_cross_entropy`, as it comes and chunked, on the supervised tokens. "products alone" are the lm_heads' matrix
products and nothing else, "liger" is its chunked JSD (on a GPU). All sides run in turns on the same tensors;
memory is measured with each side in a process of its own, beyond inputs and gradients. The last table is the error of
the hidden states' gradient against float64 when the teacher's logits are within 0.05 of the student's.

    python benchmarks/linear_loss.py [--device cuda] [--tokens 4096] [--supervised 1024] [--vocabulary 49152]
        [--hidden 576] [--teacher-hidden 576] [--repeats 3] [--no-memory]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from loss_cpu import by_hand, median_seconds, resident_bytes
from torch import Tensor
from torch.nn import functional as F

from pocl_fast.linear_loss import linear_distillation_loss
from pocl_fast.objectives import Objective
from pocl_fast.teachers import LinearTeacher

JSD = Objective("jsd", temperature=1.33, alpha=0.3, beta=0.5, temperature_scaling="none")
OBJECTIVE = Objective("forward_kl", temperature=1.33, alpha=0.3)
CE = Objective(alpha=1.0)


class Inputs:
    """Hidden states and lm_heads; the students' want gradients."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        N, n, V = options.tokens, options.supervised, options.vocabulary
        H, H_t, device = options.hidden, options.teacher_hidden, options.device

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.hidden = normal(N, H).requires_grad_()
        self.weight = normal(V, H, scale=3 * H**-0.5).requires_grad_()
        self.teacher_hidden, self.teacher_weight = normal(N, H_t), normal(V, H_t, scale=3 * H_t**-0.5)
        self.labels = torch.full((N,), -100, device=device)
        self.labels[torch.randperm(N, device=device)[:n]] = torch.randint(0, V, (n,), device=device)
        self.chosen = (self.labels != -100).nonzero()[:, 0]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student's and teacher's hidden states and labels of the supervised tokens."""
        return self.hidden[self.chosen], self.teacher_hidden[self.chosen], self.labels[self.chosen]


def ours(x: Inputs, number: int) -> Tensor:
    teacher = LinearTeacher(x.teacher_hidden, x.teacher_weight)
    return linear_distillation_loss(x.hidden, x.weight, teacher, x.labels, OBJECTIVE, max_supervised=number).loss


def naive(x: Inputs, _number: int) -> Tensor:
    student, teacher = F.linear(x.hidden, x.weight), F.linear(x.teacher_hidden, x.teacher_weight)
    return by_hand(student[x.chosen], teacher[x.chosen], x.labels[x.chosen], OBJECTIVE)


def naive_masked(x: Inputs, _number: int) -> Tensor:
    """As a training script does: every token's loss, those that do not count masked out."""
    s, t = F.linear(x.hidden, x.weight).float(), F.linear(x.teacher_hidden, x.teacher_weight).float()
    tau, alpha = 1.33, 0.3
    log_q, log_p = F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)
    D = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counted = x.labels != -100
    D = (D * counted).sum() / counted.sum()
    return alpha * F.cross_entropy(s, x.labels) + (1 - alpha) * tau**2 * D


def naive_supervised(x: Inputs, _number: int) -> Tensor:
    hidden, teacher_hidden, labels = x.rows()
    return by_hand(F.linear(hidden, x.weight), F.linear(teacher_hidden, x.teacher_weight), labels, OBJECTIVE)


def our_jsd(x: Inputs, number: int) -> Tensor:
    teacher = LinearTeacher(x.teacher_hidden, x.teacher_weight)
    return linear_distillation_loss(x.hidden, x.weight, teacher, x.labels, JSD, max_supervised=number).loss


def liger_jsd(x: Inputs, _number: int) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    hidden, teacher_hidden, labels = x.rows()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=0.5, temperature=1.33, chunk_size=1024
    )
    out = loss(hidden, x.weight, teacher_hidden, x.teacher_weight, labels)
    return out[0] if isinstance(out, tuple) else out


def products(x: Inputs, number: int) -> Tensor:
    """The four matrix products on the supervised tokens, in chunks, rounded to bf16 as torch does."""
    hidden, teacher_hidden, _ = x.rows()
    for first in range(0, number, 1024):
        h, t = hidden[first : first + 1024].detach(), teacher_hidden[first : first + 1024]
        logits = h @ x.weight.detach().t()
        t @ x.teacher_weight.t()
        logits @ x.weight.detach()
        logits.t() @ h
    return x.hidden.sum() * 0


def our_ce(x: Inputs, number: int) -> Tensor:
    return linear_distillation_loss(x.hidden, x.weight, None, x.labels, CE, max_supervised=number).loss


def torch_ce(x: Inputs, _number: int) -> Tensor:
    hidden, _, labels = x.rows()
    return F.linear_cross_entropy(hidden, x.weight, labels)


def torch_ce_chunked(x: Inputs, _number: int) -> Tensor:
    hidden, _, labels = x.rows()
    return F.linear_cross_entropy(hidden, x.weight, labels, options=torch.nn.LinearCrossEntropyOptions())


TABLES = {
    "forward KL + CE": {
        "ours": ours,
        "products alone": products,
        "by hand, masked": naive_masked,
        "by hand": naive,
        "by hand, supervised": naive_supervised,
    },
    "cross-entropy alone": {"ours": our_ce},
}
if hasattr(F, "linear_cross_entropy"):
    TABLES["cross-entropy alone"] |= {"torch": torch_ce, "torch, chunked": torch_ce_chunked}
if torch.cuda.is_available() and find_spec("liger_kernel"):
    TABLES["JSD + CE"] = {"ours": our_jsd, "products alone": products, "liger": liger_jsd}


def step(table: str, side: str, x: Inputs, number: int) -> None:
    """Forward and backward once. Frees its gradients itself: left to the next side, that would be part of its time."""
    TABLES[table][side](x, number).backward()
    x.hidden.grad = x.weight.grad = None
    if x.hidden.is_cuda:
        torch.cuda.synchronize()


def extra_peak(table: str, side: str, options: argparse.Namespace) -> float:
    """The peak of memory beyond inputs and gradients, MiB. Runs in a process of its own."""
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**{**vars(options), "tokens": 32, "supervised": 8, "vocabulary": 64})
    step(table, side, Inputs(small), 8)
    x = Inputs(options)
    gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.weight))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(table, side, x, options.supervised)
        return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step(table, side, x, options.supervised)
    return (resident_bytes("VmHWM") - before - gradients) / 2**20


def print_table(table: str, options: argparse.Namespace) -> None:
    x = Inputs(options)
    runs: dict[str, Callable[[], None]] = {}
    for side in TABLES[table]:
        try:
            step(table, side, x, options.supervised)
            runs[side] = partial(step, table, side, x, options.supervised)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"\n{table}, {side}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    times, others = median_seconds(runs, options.repeats)
    print(f"\nother programs had {others:.0%} of the machine in the turns that count")
    print("{:<24}{:>10}{:>11}{:>14}{:>11}".format(table, "time", "over ours", "extra peak", "over ours"))
    ours_peak = None
    for side in runs:
        line = f"{side:<24}{1e3 * times[side]:>7.0f} ms{times[side] / times['ours']:>10.2f}x"
        if not options.no_memory and side != "products alone":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak = pool.submit(extra_peak, table, side, options).result()
            ours_peak = ours_peak or peak
            line += f"{peak:>10.0f} MiB{peak / ours_peak:>10.2f}x"
        print(line, flush=True)


def print_gradient_error(options: argparse.Namespace) -> None:
    small = argparse.Namespace(**{**vars(options), "tokens": 128, "supervised": 128, "teacher_hidden": options.hidden})
    x = Inputs(small)
    with torch.no_grad():  # the same lm_head, hidden states moved until the logits are 0.05 apart
        moved = torch.randn_like(x.hidden, dtype=torch.float32)
        gap = (moved @ x.weight.float().t()).std()
        teacher_hidden = (x.hidden.float() + moved * (0.05 / gap)).double()
    exact = x.hidden.detach().double().requires_grad_()
    teacher = LinearTeacher(teacher_hidden, x.weight.detach().double())
    objective = Objective("forward_kl", temperature=1.33)
    linear_distillation_loss(exact, x.weight.detach().double(), teacher, x.labels, objective).loss.backward()
    assert exact.grad is not None
    teacher_logits = teacher_hidden @ x.weight.detach().double().t()
    print("\nerror of the hidden states' gradient, relative in norm (gap 0.05)")
    for name in ("ours", "logits rounded to bf16"):
        hidden = x.hidden.detach().clone().requires_grad_()
        if name == "ours":
            fused_teacher = LinearTeacher(teacher_hidden.float(), x.weight.detach().float())
            linear_distillation_loss(hidden, x.weight.detach(), fused_teacher, x.labels, objective).loss.backward()
        else:
            by_hand(F.linear(hidden, x.weight.detach()), teacher_logits.bfloat16(), x.labels, objective).backward()
        assert hidden.grad is not None
        error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
        print(f"{name:<24}{float(error):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--supervised", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    options = parser.parse_args()
    options.threads = torch.get_num_threads()
    print(
        f"{options.device}, {options.threads} threads, {options.supervised} of {options.tokens} tokens supervised,"
        f" V {options.vocabulary}, H {options.hidden}, teacher's {options.teacher_hidden}, bf16; forward and backward"
    )
    for table in TABLES:
        print_table(table, options)
    print_gradient_error(options)


if __name__ == "__main__":
    main()
