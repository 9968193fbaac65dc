"""The torch operators behind the losses of logits: each gives losses and gradient together, computed by a backend.

CPU tensors go to C++ (`pocl_fast._C`), CUDA and ROCm tensors to Triton (`pocl_fast.kernels`). Autograd lives here: the
gradient is computed with the loss, and backward only multiplies it by what comes in. Nothing is checked twice: see
`checks.py`. The C++ binding checks the indices of a teacher of K entries a token; on a GPU nobody does, for that would
wait for it: a kernel run with TRITON_DEBUG=1 stops at an index outside the vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.reference import Rows

NUM_STATS = len(Rows._fields)
ONCE = (
    "the fused distillation loss can be differentiated once: its gradient is computed with it and is not itself"
    " differentiable. For create_graph=True use backend='reference'"
)
SECOND_BACKWARD = (
    "backward was called a second time through one fused distillation loss; pass retain_graph=True to the first call,"
    " or add the losses and call backward once"
)


# ---- the operators ----
# A teacher's logits and its k best have an operator each: every argument of one costs 7 µs a call. Each has a twin,
# named with a `_`, whose gradient takes the place of the logits in `student`. Autograd learns of that by
# `with_gradient`: an operator that writes over an argument cannot have a derivative itself.


@torch.library.custom_op("pocl_fast::distillation_rows", mutates_args=())
def distillation_rows(
    student: Tensor,  # [N, V_s], last dimension contiguous
    teacher: Tensor,  # [N, V_t], the same
    labels: Tensor,  # from here on the fields of Tokens
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,  # from here on the fields of Settings but `tail`
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    needs_grad: bool,
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the scaled losses, [] fp32, or where not `reduced` each token's, [N]; the rows of `reference.Rows`,
    unscaled, [7, N] fp32; and the gradient of the sum [N, V_s], empty unless `needs_grad`."""
    tokens = Tokens(labels, temperature, alpha, row_scale)
    settings = Settings(divergence, teacher_share, temperature_power, ignore_index, transforms)
    return rows_of(backend, student, teacher, None, tokens, settings, needs_grad=needs_grad, reduced=reduced)


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
    """The first two of `distillation_rows`."""
    tokens = Tokens(labels, temperature, alpha, row_scale)
    settings = Settings(divergence, teacher_share, temperature_power, ignore_index, transforms)
    rows = rows_of(backend, student, teacher, None, tokens, settings, needs_grad=True, reduced=reduced, grad=student)
    return rows[:2]


@torch.library.custom_op("pocl_fast::sparse_distillation_rows", mutates_args=())
def sparse_distillation_rows(
    student: Tensor,  # [N, V], last dimension contiguous
    log_probs: Tensor,  # [N, K] at temperature 1; −inf: no entry
    indices: Tensor,  # [N, K] int32 or int64, distinct in a row; not looked at where log_probs is −inf
    labels: Tensor,  # from here on the fields of Tokens
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,  # from here on the fields of Settings
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    tail: str,
    needs_grad: bool,
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `distillation_rows`, the teacher being K entries a token."""
    tokens = Tokens(labels, temperature, alpha, row_scale)
    settings = Settings(divergence, teacher_share, temperature_power, ignore_index, transforms, tail)
    return rows_of(backend, student, log_probs, indices, tokens, settings, needs_grad=needs_grad, reduced=reduced)


@torch.library.custom_op("pocl_fast::sparse_distillation_rows_", mutates_args=("student",))
def sparse_distillation_rows_(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    row_scale: Tensor,
    divergence: str,
    teacher_share: float,
    temperature_power: int,
    ignore_index: int,
    transforms: list[float],
    tail: str,
    reduced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The first two of `sparse_distillation_rows`."""
    tokens = Tokens(labels, temperature, alpha, row_scale)
    settings = Settings(divergence, teacher_share, temperature_power, ignore_index, transforms, tail)
    rows = rows_of(
        backend, student, log_probs, indices, tokens, settings, needs_grad=True, reduced=reduced, grad=student
    )
    return rows[:2]


def _empty_outputs(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a rows operator gives for student logits [N, V], without values."""
    *_, needs_grad, reduced, _backend = others
    N, V = student.shape
    loss = student.new_empty(() if reduced else (N,), dtype=torch.float32)
    stats = student.new_empty((NUM_STATS, N), dtype=torch.float32)
    return loss, stats, student.new_empty((N, V) if needs_grad else (0,))


def _empty_outputs_over(student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(student, False, *others[-2:])[:2]


for _operator in (distillation_rows, sparse_distillation_rows):
    _operator.register_fake(_empty_outputs)
for _operator in (distillation_rows_, sparse_distillation_rows_):
    _operator.register_fake(_empty_outputs_over)


# ---- autograd ----


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
    ctx.others = len(inputs) - 1
    # not save_for_backward: handed over for good, so that autograd takes the buffer as it is instead of a copy
    ctx.grad = grad if needs_grad else None


def _backward(ctx: Any, upstream: Tensor | None, _stats: None, _grad: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * ctx.others
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


for _operator in (distillation_rows, sparse_distillation_rows):
    _operator.register_autograd(_backward, setup_context=_setup_context)
with_gradient.register_autograd(_backward_of_saved, setup_context=_save_gradient)


# ---- backends ----


def rows_of(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    tokens: Tokens,
    settings: Settings,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's `sparse_distillation_rows` where there are indices, else its `distillation_rows`. Their options:
    needs_grad, reduced, and `grad`, where the gradient is to be written."""
    if indices is None:
        return backend_module(backend).distillation_rows(student, teacher, tokens, settings, **options)
    rows = backend_module(backend, "sparse").sparse_distillation_rows
    return rows(student, teacher, indices, tokens, settings, **options)


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


@functools.cache
def _module(name: str, hint: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{hint} ({error})") from error
