"""The torch operators behind the losses: custom ops that give losses and gradient together, by a backend.

CPU tensors go to C++ (`pocl_fast._C`), CUDA and ROCm tensors to Triton (`pocl_fast.kernels`). Autograd lives here: the
gradient is computed with the loss, and backward only multiplies it by what comes in. Checks nothing that `losses.py`
has checked.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

NUM_STATS = 7  # the fields of reference.Rows
ONCE = (
    "the fused distillation loss can be differentiated once: its gradient is computed with it and is not itself"
    " differentiable. For create_graph=True use backend='reference'"
)
SECOND_BACKWARD = (
    "backward was called a second time through one fused distillation loss; pass retain_graph=True to the first call,"
    " or add the losses and call backward once"
)


@torch.library.custom_op("pocl_fast::distillation_rows", mutates_args=())
def distillation_rows(
    student: Tensor,  # [N, V_s], last dimension contiguous
    teacher: Tensor,  # [N, V_t], the same
    labels: Tensor,  # [N] int32 or int64
    temperature: Tensor,  # [1] or [N] fp32
    alpha: Tensor,  # [1] or [N] fp32
    row_scale: Tensor,  # [1] or [N] fp32: token weight over the divisor, folded into loss and gradient
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],  # scale and softcap (0: none) of the student, then of the teacher
    needs_grad: bool,
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the scaled losses, [] fp32, or where not `reduced` each token's, [N]; the rows of `reference.Rows`,
    unscaled, [7, N] fp32; and the gradient of the sum [N, V_s], empty unless `needs_grad`."""
    return backend_module(backend).distillation_rows(
        student,
        teacher,
        labels,
        temperature,
        alpha,
        row_scale,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        transforms=transforms,
        needs_grad=needs_grad,
        reduced=reduced,
    )


@distillation_rows.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_grad, reduced, _backend = others
    return empty_outputs(student, needs_grad, reduced)


def empty_outputs(student: Tensor, needs_grad: bool, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a rows operator gives for student logits [N, V], without values."""
    N, V = student.shape
    loss = student.new_empty(() if reduced else (N,), dtype=torch.float32)
    stats = student.new_empty((NUM_STATS, N), dtype=torch.float32)
    return loss, stats, student.new_empty((N, V) if needs_grad else (0,))


@torch.library.custom_op("pocl_fast::distillation_rows_", mutates_args=("student",))
def distillation_rows_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first two of `distillation_rows`; the gradient takes the place of the logits in `student`. Autograd learns of
    it by `with_gradient`: an operator that writes over an argument cannot have a derivative itself."""
    loss, stats, _ = backend_module(backend).distillation_rows(
        student,
        teacher,
        labels,
        temperature,
        alpha,
        row_scale,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        transforms=transforms,
        needs_grad=True,
        reduced=reduced,
        grad=student,
    )
    return loss, stats


@distillation_rows_.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(student, False, others[-2])[:2]


@torch.library.custom_op("pocl_fast::with_gradient", mutates_args=())
def with_gradient(loss: Tensor, student: Tensor, backend: str) -> Tensor:
    """`loss`, [] or [N], of which the gradient by `student` [N, V] is what lies in the memory of `student`."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, student: Tensor, backend: str) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("pocl_fast::scale_rows", mutates_args=("grad",))
def scale_rows(grad: Tensor, upstream: Tensor, backend: str) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [1] or [N]; touches no row whose factor is 1."""
    backend_module(backend).scale_rows_(grad, upstream)


@scale_rows.register_fake
def _(grad: Tensor, upstream: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the stats and the gradient would cost as much as the kernel
    _loss, stats, grad = output
    ctx.mark_non_differentiable(stats, grad)
    needs_grad, _reduced, ctx.backend = inputs[-3:]
    # not save_for_backward: handed over for good, so that autograd takes the buffer as it is instead of a copy
    ctx.grad = grad if needs_grad else None


def _backward(ctx: Any, upstream: Tensor | None, _stats: None, _grad: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 13
    if upstream is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    if ctx.grad is None:
        raise RuntimeError(SECOND_BACKWARD)
    grad = ctx.grad
    if type(upstream) is Tensor and not graph_is_kept():
        ctx.grad = None
    return _scaled(grad, upstream, ctx.backend), *nothing


def _save_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    _loss, student, ctx.backend = inputs
    ctx.save_for_backward(student)  # so that a later change of this memory is an error, by its version


def _backward_of_saved(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, None]:
    (grad,) = ctx.saved_tensors
    return None, _scaled(grad.detach(), upstream, ctx.backend), None


def _scaled(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """`grad` [N, V] times `upstream`, [] or [N]: in place, but where the graph is kept for another backward."""
    if type(upstream) is not Tensor:  # traced by a compiler: a multiplication that it can join to what follows
        return (grad * upstream.reshape(-1, 1)).to(grad.dtype)
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    if graph_is_kept():
        grad = grad.clone()
    if backend != "cpp" or upstream.dim() or upstream.item() != 1:  # as it is where the loss itself is differentiated
        scale_rows(grad, upstream.reshape(-1).contiguous(), backend)
    return grad


def graph_is_kept() -> bool:
    """Whether the backward now running was called with retain_graph=True, so that another may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


distillation_rows.register_autograd(_backward, setup_context=_setup_context)
with_gradient.register_autograd(_backward_of_saved, setup_context=_save_gradient)


def check_labels(labels: Tensor, counted: Tensor, V: int) -> None:
    """Raises ValueError for a counted label outside the vocabulary; looks into the tensor, so for a CPU's alone."""
    wrong = counted & ((labels < 0) | (labels >= V))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"label {int(labels[row])} at token {row} is outside the student's vocabulary of {V}")


def backend_module(backend: str, kernel: str = "dense") -> Any:
    """The module of a backend's `distillation_rows` and `scale_rows_`, or with "sparse" of its
    `sparse_distillation_rows`; or an error that says how to get it."""
    if backend == "cpp":
        return _module(
            "pocl_fast.loss.cpp",
            "the C++ part of pocl_fast is not built: install the package (pip install -e .) with g++",
        )
    return _module(
        f"pocl_fast.kernels.{kernel}",
        'backend "triton" needs triton: pip install "pocl-fast[gpu]", or pass backend="reference"',
    )


def _module(name: str, hint: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{hint} ({error})") from error
