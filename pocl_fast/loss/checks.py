"""The checks of both losses' arguments, and the choice of the backend. An error says what would be right: a TypeError
for another kind of thing (see `kinds.py`), a ValueError for a value, shape, dtype or device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pocl_fast.loss.kinds import check_integer, check_number, check_tensor
from pocl_fast.loss.teacher_output import DenseTeacher, TeacherOutput, TopKTeacher

if TYPE_CHECKING:
    from pocl_fast.loss.vocabulary_shards import VocabularyShards

Backend: TypeAlias = Literal["auto", "triton", "cpp", "reference"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- the backend ----


def choose_backend(backend: Backend, student: Tensor, teacher: Tensor) -> Backend:
    """The backend that "auto" means for these tensors, or the one asked for where it takes them."""
    dtypes = {student.dtype, teacher.dtype}
    if not dtypes <= {*_FUSED_DTYPES, torch.float64}:
        raise ValueError(f"logits must be fp32, bf16, fp16 or float64, got {student.dtype} and {teacher.dtype}")
    if backend == "auto":
        if torch.float64 in dtypes:
            return "reference"
        by_device: dict[str, Backend] = {"cuda": "triton", "cpu": "cpp"}
        return by_device.get(student.device.type, "reference")
    if backend not in ("triton", "cpp", "reference"):
        raise ValueError(f'backend must be "auto", "triton", "cpp" or "reference", got {backend!r}')
    if backend != "reference" and not dtypes <= set(_FUSED_DTYPES):
        raise ValueError(
            f"backend {backend!r} takes fp32, bf16 and fp16 logits, got {student.dtype} and {teacher.dtype}"
        )
    if backend == "cpp" and student.device.type != "cpu":
        raise ValueError(f'backend "cpp" takes CPU tensors, got {student.device}')
    return backend


def check_differentiation(backend: Backend, *inputs: Tensor) -> None:
    """Raises RuntimeError where a fused loss is differentiated in another way than by backward, which alone has its
    gradient."""
    if backend == "reference" or torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for tensor in inputs:
        while functorch.is_batchedtensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        if functorch.is_gradtrackingtensor(tensor):
            kind = "torch.func's grad, vjp and jvp"
        elif forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            kind = "forward-mode differentiation"
        else:
            continue
        raise RuntimeError(f"the fused losses do not know {kind}: call backward(), or pass backend='reference'")


def check_overwritable(logits: Tensor, rows: Tensor, teacher: Tensor, backend: Backend) -> None:
    """For `inplace`: the caller's logits, the same as [N, V_s], and the teacher's."""
    if backend == "reference":
        raise ValueError('inplace=True needs a fused backend: backend "reference" leaves the gradient to autograd')
    if logits.is_leaf or (not torch.compiler.is_compiling() and rows._base is not None and rows._base.is_leaf):
        raise ValueError(
            "inplace=True would write the gradient over student_logits that are a leaf, as a parameter is, or a view of"
            " one; it is for what a model computes"
        )
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"inplace=True needs rows of their own, got student_logits of strides {logits.stride()}")
    # a compiler copies what is read under two names
    if not torch.compiler.is_compiling() and rows.untyped_storage()._cdata == teacher.untyped_storage()._cdata:
        raise ValueError("inplace=True would write over teacher_logits, which share their memory with student_logits")


# ---- logits, hidden states and labels ----


def check_rows(student: Tensor, teacher: Tensor, labels: Tensor, name: str) -> None:
    """Student's and teacher's logits and the labels, of the same tokens; `name` is the teacher's in messages."""
    check_tensor("student_logits", student)
    check_tensor(name, teacher)
    check_tensor("labels", labels)
    if student.dim() not in (2, 3):
        raise ValueError(f"student_logits must be [N, V] or [B, T, V], got shape {tuple(student.shape)}")
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and {name} {tuple(teacher.shape)} must be of the same"
            " tokens: all but the last dimension must be equal"
        )
    if labels.shape != student.shape[:-1]:
        raise ValueError(f"labels must be {tuple(student.shape[:-1])}, one a row of logits; got {tuple(labels.shape)}")
    _check_label_dtype(labels)
    if student.shape[-1] == 0 or teacher.shape[-1] == 0:
        raise ValueError(f"the vocabulary is empty: student_logits and {name} need at least one column")
    if not (student.device == teacher.device == labels.device):
        raise ValueError(
            f"student_logits, {name} and labels are on {student.device}, {teacher.device} and {labels.device};"
            " move them to one"
        )


def check_labels_of_hidden(hidden: Tensor, labels: Tensor) -> None:
    check_tensor("labels", labels)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:-1])}, one a row of student_hidden; got {tuple(labels.shape)}"
        )
    _check_label_dtype(labels)
    if labels.device != hidden.device:
        raise ValueError(f"student_hidden is on {hidden.device} and labels on {labels.device}; move them to one")


def _check_label_dtype(labels: Tensor) -> None:
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, got {labels.dtype}")


def check_labels_within(labels: Tensor, counted: Tensor, V: int) -> None:
    """Raises for a counted label outside the vocabulary; looks into the tensor, so for a CPU's alone."""
    wrong = counted & ((labels < 0) | (labels >= V))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"label {int(labels[row])} at token {row} is outside the student's vocabulary of {V}")


def check_head_inputs(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """An lm_head and the hidden states that it is applied to; `side` is "student" or "teacher"."""
    for name, x in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if x is not None or not name.endswith("bias"):
            check_tensor(name, x)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{side}_hidden must be [N, H] or [B, T, H], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{side}_weight must be [V, {hidden.shape[-1]}] for {side}_hidden of size {hidden.shape[-1]};"
            f" got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, x in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{side}_hidden is on {hidden.device} and {name} on {x.device}; move them to one")


def check_teacher_row(name: str, x: Tensor, student_hidden: Tensor) -> None:
    """A tensor of the teacher's that has a row for each token of the student's hidden states."""
    check_tensor(name, x)
    tokens, device = student_hidden.shape[:-1], student_hidden.device
    if x.shape[:-1] != tokens or x.shape[-1] == 0:
        raise ValueError(f"{name} must be {[*tokens, '...']}, one row a token of student_hidden; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"student_hidden is on {device} and {name} on {x.device}; move them to one")


def check_shards(shards: VocabularyShards, backend: Backend, weight: Tensor, teacher: TeacherOutput | None) -> None:
    """Whether a loss over `vocabulary_shards` can be computed of these, and its parts are those of this rank."""
    if isinstance(teacher, TopKTeacher):
        raise ValueError("vocabulary_shards takes a DenseTeacher or a LinearTeacher, got a TopKTeacher")
    if backend != "auto" or weight.dtype == torch.float64:
        raise ValueError(
            'vocabulary_shards needs backend "auto" and fp32, bf16 or fp16 tensors;'
            f" got backend {backend!r} and {weight.dtype}"
        )
    entries = None
    if teacher is not None:
        entries = teacher.logits.shape[-1] if isinstance(teacher, DenseTeacher) else len(teacher.weight)
    shards.check(len(weight), entries)


# ---- numbers ----


def check_reduction(reduction: Reduction, num_items: Tensor | float | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if num_items is not None:
        check_number("num_items", num_items)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
    elif num_items is not None and not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be positive and finite, got {num_items}")


def check_positive(**counts: int | None) -> None:
    """Numbers of tokens by their names, each at least 1 or None."""
    for name, value in counts.items():
        if value is not None:
            check_integer(name, value)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None; got {value}")


def transform(name: str, scale: float, softcap: float | None) -> tuple[float, float]:
    """(scale, softcap) of a side's logits, softcap 0 for none; `name` is "logit", "teacher_logit" or the like."""
    check_number(f"{name}_scale", scale)
    if softcap is not None:
        check_number(f"{name}_softcap", softcap)
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}_scale must be positive and finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}_softcap must be positive and finite, or None; got {softcap}")
    return float(scale), float(softcap or 0.0)
