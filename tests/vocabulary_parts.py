"""A small linear loss, whole and as the parts that ranks have of its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher
from pocl_fast.loss.vocabulary_shards import VocabularyShards


@dataclass
class Problem:
    """Hidden states [N, H], an lm_head [V, H] and its bias, a teacher of V_t entries, and the ids at which both
    vocabularies are cut; the last rank has what remains of either."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: DenseTeacher | LinearTeacher | None
    labels: Tensor
    cuts: tuple[int, ...]

    def part(self, rank: int) -> Problem:
        mine = self.rows(rank)
        teacher = self.teacher
        if isinstance(teacher, DenseTeacher):
            teacher = replace(teacher, logits=teacher.logits[:, mine])
        elif isinstance(teacher, LinearTeacher):
            teacher = replace(teacher, weight=teacher.weight[mine])
        return replace(self, weight=self.weight[mine], bias=self.bias[mine], teacher=teacher)

    def rows(self, rank: int) -> slice:
        return slice((0, *self.cuts)[rank], (*self.cuts, None)[rank])

    def in_float64(self) -> Problem:
        def exact(x):
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        teacher = self.teacher and replace(self.teacher, **{k: exact(v) for k, v in vars(self.teacher).items()})
        return replace(self, **{k: exact(v) for k, v in vars(self).items()} | {"teacher": teacher})

    def step(self, objective: Objective, upstream: Tensor | float = 1.0, **options):
        """The output, and the gradients of hidden states, weight and bias."""
        leaves = [x.detach().clone().requires_grad_(True) for x in (self.hidden, self.weight, self.bias)]
        out = linear_distillation_loss(
            *leaves[:2], self.teacher, self.labels, objective, student_bias=leaves[2], **options
        )
        (out.loss * upstream).sum().backward()
        return out, [leaf.grad for leaf in leaves]


def some_problem(cuts, kind="linear", dtype=torch.float32, V=31, V_t=31, **transform) -> Problem:
    N, H, H_t = 7, 12, 9
    labels = torch.randint(0, V, (N,))
    labels[[1, 4]] = -100
    hidden, weight, bias = (x.to(dtype) for x in (torch.randn(N, H), torch.randn(V, H), torch.randn(V)))
    teacher = {
        "dense": lambda: DenseTeacher((3 * torch.randn(N, V_t)).to(dtype), **transform),
        "linear": lambda: LinearTeacher(torch.randn(N, H_t).to(dtype), torch.randn(V_t, H_t).to(dtype), **transform),
        "none": lambda: None,
    }[kind]()
    return Problem(hidden, weight, bias, teacher, labels, cuts)


def step_of_a_part(problem: Problem, *arguments, **options):
    """On a rank: the loss, the metrics of each token, and the gradients of the hidden states and of its own rows."""
    part = problem.part(dist.get_rank())
    out, gradients = part.step(*arguments, vocabulary_shards=shards_of(part), **options)
    return out.loss.detach(), out.per_token, gradients


def shards_of(part: Problem) -> VocabularyShards:
    teacher = part.teacher
    rows = teacher.logits.t() if isinstance(teacher, DenseTeacher) else teacher and teacher.weight
    return VocabularyShards.of(dist.group.WORLD, part.weight, rows)
