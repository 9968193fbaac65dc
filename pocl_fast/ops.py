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
    row_scale: Tensor,  # [N] fp32: token weight over the divisor, folded into loss and gradient
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],  # scale and softcap (0: none) of the student, then of the teacher
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled loss of each token [N] fp32; the rows of `reference.Rows`, unscaled, [7, N] fp32; and the gradient of
    the losses' sum [N, V_s], empty unless `needs_grad`."""
    tensors = (student, teacher, labels, temperature, alpha, row_scale)
    settings = (divergence, teacher_share, temperature_power, ignore_index, transforms)
    return _run(backend, tensors, settings, needs_grad)


@distillation_rows.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_grad, _backend = others
    return empty_outputs(student, needs_grad)


def empty_outputs(student: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a rows operator gives for student logits [N, V], without values."""
    N, V = student.shape
    loss = student.new_empty((N,), dtype=torch.float32)
    stats = student.new_empty((NUM_STATS, N), dtype=torch.float32)
    return loss, stats, student.new_empty((N, V) if needs_grad else (0,))


def scaled_losses(stats: Tensor, labels: Tensor, row_scale: Tensor, ignore_index: int) -> Tensor:
    """[N] out of a row kernel's stats [7, N]; an ignored row's loss is 0 whatever its scale."""
    return torch.where(labels == ignore_index, 0.0, stats[0] * row_scale)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first two of `distillation_rows`; the gradient takes the place of the logits in `student`. Autograd learns of
    it by `with_gradient`: an operator that writes over an argument cannot have a derivative itself."""
    tensors = (student, teacher, labels, temperature, alpha, row_scale)
    settings = (divergence, teacher_share, temperature_power, ignore_index, transforms)
    loss, stats, _ = _run(backend, tensors, settings, True, grad=student)
    return loss, stats


@distillation_rows_.register_fake
def _(student: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(student, False)[:2]


@torch.library.custom_op("pocl_fast::with_gradient", mutates_args=())
def with_gradient(loss: Tensor, student: Tensor, backend: str) -> Tensor:
    """`loss` [N], of which the gradient by `student` [N, V] is what lies in the memory of `student`, row by row."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, student: Tensor, backend: str) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("pocl_fast::scale_rows", mutates_args=("grad",))
def scale_rows(grad: Tensor, upstream: Tensor, backend: str) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [N]; touches no row whose factor is 1."""
    backend_module(backend).scale_rows_(grad, upstream)


@scale_rows.register_fake
def _(grad: Tensor, upstream: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the stats and the gradient would cost as much as the kernel
    _loss, stats, grad = output
    ctx.mark_non_differentiable(stats, grad)
    needs_grad, ctx.backend = inputs[-2], inputs[-1]
    # not save_for_backward: handed over for good, so that autograd takes the buffer as it is instead of a copy
    ctx.grad = grad if needs_grad else None


def _backward(ctx: Any, upstream: Tensor | None, _stats: None, _grad: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 12
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
    """`grad` [N, V] times `upstream` [N]: in place, but where the graph is kept for another backward."""
    if type(upstream) is not Tensor:  # traced by a compiler: a multiplication that it can join to what follows
        return (grad * upstream[:, None]).to(grad.dtype)
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    if graph_is_kept():
        grad = grad.clone()
    scale_rows(grad, upstream.contiguous(), backend)
    return grad


def graph_is_kept() -> bool:
    """Whether the backward now running was called with retain_graph=True, so that another may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


distillation_rows.register_autograd(_backward, setup_context=_setup_context)
with_gradient.register_autograd(_backward_of_saved, setup_context=_save_gradient)


def _run(
    backend: str,
    tensors: tuple[Tensor, ...],
    settings: tuple[str, float, int, int, list[float]],
    needs_grad: bool,
    grad: Tensor | None = None,  # where the gradient goes; None: memory of its own
) -> tuple[Tensor, Tensor, Tensor]:
    """What `distillation_rows` gives, by a backend."""
    divergence, teacher_share, temperature_power, ignore_index, transforms = settings
    stats, grad = backend_module(backend).distillation_rows(
        *tensors,
        divergence=divergence,
        teacher_share=teacher_share,
        temperature_power=temperature_power,
        ignore_index=ignore_index,
        transforms=transforms,
        needs_grad=needs_grad,
        grad=grad,
    )
    labels, row_scale = tensors[2], tensors[5]
    return scaled_losses(stats, labels, row_scale, ignore_index), stats, grad


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
            "pocl_fast.cpp", "the C++ part of pocl_fast is not built: install the package (pip install -e .) with g++"
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
