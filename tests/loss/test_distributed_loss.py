"""A student whose parameters are sharded over two gloo processes has the loss and gradients of one process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from ranks import gloo
from torch import Tensor, nn

from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher

pytestmark = [
    pytest.mark.usefixtures("seed"),
    gloo,
]


# ---- FSDP2 ----

N, V, H, H_T = 6, 31, 12, 9  # N tokens a rank
OBJECTIVE = Objective(temperature=1.3, alpha=0.3)


class Student(nn.Module):
    """A small language model; its embedding may be its lm_head too."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, batch: Batch, divisor: float | None = None) -> Tensor:
        """Hidden states, or with a divisor the loss."""
        hidden = torch.tanh(self.body(self.embedding(batch.tokens)))
        return hidden if divisor is None else self.loss(hidden, batch, divisor)

    def loss(self, hidden: Tensor, batch: Batch, divisor: float) -> Tensor:
        return linear_distillation_loss(
            hidden,
            self.lm_head.weight,
            LinearTeacher(batch.teacher_hidden.to(hidden.dtype), batch.teacher_weight.to(hidden.dtype)),
            batch.labels,
            OBJECTIVE,
            student_bias=self.lm_head.bias,
            num_items=divisor,
        ).loss


class Batch:
    """Tokens of all ranks; the second rank has fewer that are supervised."""

    def __init__(self, world: int) -> None:
        self.tokens, self.labels = torch.randint(0, V, (2, world * N))
        self.labels[-4:] = -100
        self.teacher_hidden, self.teacher_weight = torch.randn(world * N, H_T), torch.randn(V, H_T)

    def part(self, rank: int) -> Batch:
        part = copy.copy(self)
        for name in ("tokens", "labels", "teacher_hidden"):
            setattr(part, name, getattr(self, name)[rank * N : (rank + 1) * N])
        return part

    @property
    def num_items(self) -> float:
        return float((self.labels != -100).sum())


def one_process(student: Student, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    student = copy.deepcopy(student)
    loss = student(batch, batch.num_items)
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


def sharded_step(student: Student, batch: Batch, way: str) -> tuple[Tensor, list[Tensor], str]:
    """The loss of all tokens, the whole gradients, and the kind of the lm_head's weight that the loss was given."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = dist.get_world_size()
    part, divisor = batch.part(dist.get_rank()), batch.num_items / world  # FSDP averages over the ranks
    options = {"mesh": init_device_mesh("cpu", (world,))}
    if way == "inside, bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(student.body, **options)
    if way == "outside, the head apart":
        fully_shard(student.lm_head, **options)
    fully_shard(student, reshard_after_forward=way != "outside, the head unsharded", **options)
    if way.startswith("inside"):
        kind = "Parameter"
        loss = student(part, divisor)
    else:
        hidden = student(part)
        kind = type(student.lm_head.weight).__name__
        loss = student.loss(hidden, part, divisor)
    loss.backward()
    total = loss.detach() / world
    dist.all_reduce(total)
    return total, [p.grad.full_tensor() for p in student.parameters()], kind


@pytest.mark.parametrize(
    ("way", "kind", "tied"),
    [
        ("inside", "Parameter", False),
        ("inside", "Parameter", True),
        ("outside, the head unsharded", "Parameter", False),
        ("outside, the head unsharded", "Parameter", True),
        ("outside", "DTensor", False),
        ("outside", "DTensor", True),
        ("outside, the head apart", "DTensor", False),  # FSDP does not take one parameter in two groups
    ],
)
def test_a_sharded_students_loss_and_gradients_are_those_of_one_process(two_ranks, way, kind, tied):
    student, batch = Student(tied), Batch(2)
    want, exact = one_process(student, batch)
    for loss, gradients, seen in two_ranks(sharded_step, student, batch, way):
        assert seen == kind
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradients, exact)


def test_a_student_sharded_with_mixed_precision_has_gradients_near_those_of_one_process(two_ranks):
    student, batch = Student(), Batch(2)
    want, exact = one_process(student, batch)
    for loss, gradients, _ in two_ranks(sharded_step, student, batch, "inside, bf16"):
        torch.testing.assert_close(loss, want, rtol=1e-2, atol=0)
        for gradient, value in zip(gradients, exact, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - value).norm() <= 2e-2 * value.norm()


# ---- DeepSpeed ZeRO-3 ----


def zero3_step(student: Student, batch: Batch, way: str) -> tuple[Tensor, list[Tensor]]:
    """The loss of all tokens and the whole gradients."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=student, model_parameters=student.parameters(), config=config)
    part, divisor = batch.part(rank), batch.num_items / world  # it averages over the ranks too
    if way == "inside":
        loss = engine(part, divisor)
        engine.backward(loss)
    else:
        hidden = engine(part)
        with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3"):
            student.loss(hidden, part, divisor)
        with deepspeed.zero.GatheredParameters(list(student.lm_head.parameters())):
            loss = student.loss(hidden, part, divisor)
            engine.backward(loss)
    total = loss.detach() / world
    dist.all_reduce(total)
    return total, [safe_get_full_grad(p) for p in student.parameters()]


@pytest.mark.parametrize("way", ["inside", "outside"])
def test_a_student_sharded_by_deepspeed_has_the_loss_and_gradients_of_one_process(two_ranks, way):
    pytest.importorskip("deepspeed")
    student, batch = Student(), Batch(2)
    want, exact = one_process(student, batch)
    for loss, gradients in two_ranks(zero3_step, student, batch, way):
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradients, exact)
