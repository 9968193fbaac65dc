"""lm_heads cut along the vocabulary over two and three gloo processes: every rank has what one process computes."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from memory import peak_of
from precise import relative_error
from ranks import Ranks, gloo
from torch import Tensor
from vocabulary_parts import Problem, shards_of, some_problem, step_of_a_part

from pocl_fast.loss import vocabulary_shards
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import DenseTeacher, TopKTeacher
from pocl_fast.loss.vocabulary_shards import MATRICES, VocabularyShards

pytestmark = [
    pytest.mark.usefixtures("seed"),
    gloo,
]


def assert_parts_match(
    ranks: Ranks, problem: Problem, objective: Objective, tolerance=1e-5, least=1e-14, atol=1e-9, **options
) -> None:
    """Every rank's loss, metrics and gradients agree with those of one process, in float64."""
    want, exact = problem.in_float64().step(objective, **options)
    parts = ranks(partial(step_of_a_part, problem, objective, **options))
    for rank, (loss, per_token, gradients) in enumerate(parts):
        torch.testing.assert_close(loss.double(), want.loss, rtol=3e-6, atol=atol, equal_nan=True)
        for name, value in want.per_token.items():
            torch.testing.assert_close(
                per_token[name].double(), value, rtol=2e-6, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        mine = problem.rows(rank)
        for gradient, whole, own in zip(gradients, exact, (slice(None), mine, mine), strict=True):
            assert gradient.dtype == problem.hidden.dtype
            error = (gradient.double() - whole[own]).norm()
            assert error <= tolerance * whole.norm() + least


def the_ranks(request, cuts) -> Ranks:
    return request.getfixturevalue({1: "two_ranks", 2: "three_ranks"}[len(cuts)])


# a last part of one entry, and of nearly all
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "linear", "none"])
@pytest.mark.parametrize("cuts", [(16,), (30,), (11, 22), (1, 5)])
def test_a_cut_vocabulary_gives_what_a_whole_one_does(request, divergence, kind, cuts):
    objective = Objective(divergence, temperature=1.3, alpha=1.0 if kind == "none" else 0.3)
    assert_parts_match(the_ranks(request, cuts), some_problem(cuts, kind), objective, chunk_tokens=2)


# bf16: the gradient by the logits is rounded on its way into the products, and their results
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_it_does_so_in_half_precision(two_ranks, divergence, dtype, tolerance):
    assert_parts_match(two_ranks, some_problem((16,), dtype=dtype), Objective(divergence, alpha=0.3), tolerance)


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl", "tvd"])
@pytest.mark.parametrize(("V", "V_t"), [(31, 27), (25, 31)])
def test_it_does_so_with_another_vocabulary_of_the_teacher(three_ranks, divergence, V, V_t):
    assert_parts_match(three_ranks, some_problem((11, 22), V=V, V_t=V_t), Objective(divergence, alpha=0.3))


@pytest.mark.parametrize("kind", ["linear", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_it_does_so_with_scales_and_softcaps(two_ranks, kind, softcap):
    problem = some_problem((16,), kind, logit_scale=0.5, logit_softcap=softcap)
    objective = Objective("skew_forward_kl", temperature=1.3, alpha=1.0 if kind == "none" else 0.3)
    assert_parts_match(two_ranks, problem, objective, logit_scale=0.7, logit_softcap=softcap)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum", "upstream": -2.5},
        {"reduction": "mean", "num_items": 29, "token_weights": torch.linspace(0, 2, 7)},
        {"reduction": "none", "upstream": torch.tensor([0.5, -2.0, 9.0, 0.0, 3.0, 1.0, 0.1])},
    ],
    ids=lambda options: options["reduction"],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_it_does_so_with_every_reduction_and_values_of_tokens(two_ranks, divergence, options):
    objective = Objective(divergence, temperature=torch.linspace(0.7, 2, 7), alpha=torch.linspace(0, 1, 7))
    assert_parts_match(two_ranks, some_problem((16,)), objective, chunk_tokens=2, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_minus_infinity_on_either_side_matches(three_ranks, divergence, alpha):
    problem = some_problem((11, 22), "dense")
    problem.bias[[3, 30]] = -torch.inf
    problem.labels[:] = torch.tensor([4, -100, 12, 25, 29, 6, 7])
    logits = problem.teacher.logits
    logits[0, 7], logits[2, 11:22], logits[3, :22], logits[4, :30], logits[5] = [-torch.inf] * 5  # a part, two, all
    assert_parts_match(three_ranks, problem, Objective(divergence, temperature=1.3, alpha=alpha))


# what is left out lies in one part, is nearly all or nearly nothing, is all of a part, is all
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("of_student", [slice(11, 22), slice(0, 29), slice(2, None, 2)])
def test_filtered_sides_match(three_ranks, divergence, of_student):
    """All tokens, and two for themselves, so that a small gradient is not measured by others."""
    problem = some_problem((11, 22), "dense")
    problem.bias[of_student] = -torch.inf
    logits = problem.teacher.logits
    logits[0][logits[0] < logits[0].topk(4).values[-1]] = -torch.inf
    logits[2, 1::2], logits[3, 30], logits[5, :22], logits[6, ::2] = [-torch.inf] * 4
    logits[3, 30] += 20
    objective = Objective(divergence, temperature=1.3)
    for tokens in ([0, 2, 3, 5, 6], [0], [3]):
        problem.labels[:] = -100
        problem.labels[tokens] = 29
        # a mixture's u is known to 1e-7, and hardly differs between entries of which one side has little
        # fp32 knows a probability near 1 to 6e-8: a gradient of 2e-4 was 4e-9 off
        least = 2e-8 if divergence in ("forward_kl", "reverse_kl") else 3e-6
        # and logarithms of some 20 to 1e-6, of which a small divergence is a difference: 3e-8 of 5e-3 was seen
        assert_parts_match(three_ranks, problem, objective, least=least, atol=1e-7)


# as attention's masks are: on one side and on both
@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "tvd"])
def test_the_lowest_numbers_as_masks_make_no_nan(two_ranks, divergence):
    problem = some_problem((16,), "dense")
    lowest = torch.finfo(torch.float32).min
    problem.bias[10:20], problem.teacher.logits[:, 10:20] = lowest, lowest
    problem.labels.clamp_(max=9)
    assert_parts_match(two_ranks, problem, Objective(divergence, temperature=0.5, alpha=0.3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_makes_its_row_nan_and_no_other(two_ranks, divergence, bad):
    problem = some_problem((16,), "dense")
    problem.teacher.logits[[0, 1], 20] = bad  # of which the second is ignored
    for loss, _, (gradient, _, _) in two_ranks(
        partial(step_of_a_part, problem, Objective(divergence, alpha=0.3), reduction="none")
    ):
        assert loss.isnan().tolist() == [True] + [False] * 6
        assert gradient.isnan().any(1).tolist() == [True] + [False] * 6


def test_a_label_of_minus_infinity_costs_infinitely_much(two_ranks):
    problem = some_problem((16,))
    problem.labels[:], problem.labels[0], problem.bias[20] = 3, 20, -torch.inf
    for loss, _, gradients in two_ranks(partial(step_of_a_part, problem, Objective(alpha=0.3), reduction="none")):
        assert loss.isinf().tolist() == [True] + [False] * 6
        assert all(gradient.isfinite().all() for gradient in gradients)


# down to a divergence of 1e-9 nats. One-hot hidden states make the weight's columns the logits, exactly
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("distance", "tolerance"), [(1e-1, 5e-5), (1e-2, 2e-5), (1e-3, 3e-4), (1e-4, 5e-3)])
def test_a_small_divergence_keeps_its_digits(two_ranks, divergence, distance, tolerance):
    logits = 3 * torch.randn(7, 5003)
    teacher = DenseTeacher(logits + distance * torch.randn_like(logits))
    labels = torch.randint(0, 5003, (7,))
    problem = Problem(torch.eye(7), logits.t().contiguous(), torch.zeros(5003), teacher, labels, (2000,))
    want, _ = problem.in_float64().step(Objective(divergence))
    if divergence == "tvd":  # linear, not quadratic, in the distance: so is its error in that of log p - log q
        tolerance = max(tolerance, 1e-6 / distance)
    for _, per_token, _ in two_ranks(step_of_a_part, problem, Objective(divergence)):
        error = relative_error(per_token["divergence"], want.per_token["divergence"])
        assert error <= tolerance


def communication(problem: Problem, divergence: str, needs_grad: bool):
    """The names and sizes of what a rank tells the others during a call."""
    part = problem.part(dist.get_rank())
    part.hidden.requires_grad_(needs_grad)
    shards, told = shards_of(part), []

    def spy(name):
        real = getattr(dist, name)

        def counted(*arguments, **options):
            told.append((name, arguments[-1].numel()))
            return real(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(dist, name, spy(name))
        linear_distillation_loss(
            part.hidden,
            part.weight,
            part.teacher,
            part.labels,
            Objective(divergence),
            chunk_tokens=3,
            vocabulary_shards=shards,
        )
    return told


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ranks_tell_each_other_a_few_numbers_a_token_and_the_hidden_states_gradient_once(
    two_ranks, divergence, needs_grad
):
    problem = some_problem((16,))
    chunks = [3, 2]  # of five tokens that are supervised
    expected = []
    for tokens in chunks:
        expected.append(("all_gather", 12 * tokens))
        if divergence not in ("forward_kl", "reverse_kl"):
            expected.append(("all_reduce", 2 * tokens))
    if needs_grad:
        expected.append(("all_reduce", problem.hidden.numel()))
    assert two_ranks(communication, problem, divergence, needs_grad) == [expected] * 2


def peak_of_a_part(problem: Problem, divergence: str, chunk: int) -> int:
    part = problem.part(dist.get_rank())
    shards = shards_of(part)
    part.hidden.requires_grad_(True)

    def step():
        linear_distillation_loss(
            part.hidden,
            part.weight,
            part.teacher,
            part.labels,
            Objective(divergence, alpha=0.3),
            logit_softcap=20.0,
            chunk_tokens=chunk,
            vocabulary_shards=shards,
        )

    step()
    return peak_of(step)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_chunk_needs_so_many_matrices_as_its_size_is_chosen_by(two_ranks, divergence):
    chunk, rows = 8, 4096
    problem = some_problem((rows,), V=2 * rows, V_t=2 * rows)
    problem.labels[:] = 3
    problem = replace(
        problem,
        hidden=problem.hidden.repeat(4, 1),
        labels=problem.labels.repeat(4),
        teacher=replace(problem.teacher, hidden=problem.teacher.hidden.repeat(4, 1)),
    )
    for peak in two_ranks(peak_of_a_part, problem, divergence, chunk):
        assert peak <= 4 * chunk * rows * MATRICES


def test_what_is_frozen_has_no_gradient_and_no_grad_computes_none(two_ranks):
    for frozen in (two_ranks(step_of_frozen, some_problem((16,)), name) for name in ("hidden", "weight", "nothing")):
        assert frozen == [True, True]


def step_of_frozen(problem: Problem, frozen: str) -> bool:
    part = problem.part(dist.get_rank())
    shards = shards_of(part)
    part.hidden.requires_grad_(frozen != "hidden")
    part.weight.requires_grad_(frozen != "weight")
    with torch.set_grad_enabled(frozen != "nothing"):
        loss = linear_distillation_loss(
            part.hidden, part.weight, part.teacher, part.labels, Objective(alpha=0.3), vocabulary_shards=shards
        ).loss
    if frozen == "nothing":
        return not loss.requires_grad
    loss.backward()
    return (part.hidden.grad is None) == (frozen == "hidden") and (part.weight.grad is None) == (frozen == "weight")


def compiled_step(problem: Problem) -> bool:
    """Whether a compiled step gives what an eager one does."""
    part = problem.part(dist.get_rank())
    shards = shards_of(part)

    def step(hidden, weight):
        return linear_distillation_loss(
            torch.tanh(hidden), weight, part.teacher, part.labels, Objective("jsd", alpha=0.3), vocabulary_shards=shards
        ).loss

    leaves = part.hidden.requires_grad_(True), part.weight.requires_grad_(True)
    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    return all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_a_step_compiles_without_a_break(two_ranks):
    assert two_ranks(compiled_step, some_problem((16,))) == [True, True]


def step_of_a_dtensor(problem: Problem) -> Tensor:
    """The whole gradient of a weight that is cut as PyTorch's tensor parallelism cuts it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(problem.weight, mesh, [Shard(0)]).requires_grad_(True)
    own = weight.to_local()
    first = dist.get_rank() * -(-len(problem.weight) // dist.get_world_size())
    teacher = replace(problem.teacher, weight=problem.teacher.weight[first : first + len(own)])
    shards = VocabularyShards.of(mesh.get_group(), own, teacher.weight)
    linear_distillation_loss(
        problem.hidden, weight, teacher, problem.labels, Objective(alpha=0.3), vocabulary_shards=shards
    ).loss.backward()
    return weight.grad.full_tensor()


def test_a_weight_may_be_cut_as_torch_cuts_it(three_ranks):
    problem = some_problem((11, 22))
    problem.bias[:] = 0
    _, (_, want, _) = problem.in_float64().step(Objective(alpha=0.3))
    for gradient in three_ranks(step_of_a_dtensor, problem):
        torch.testing.assert_close(gradient, want.float())


def message_of(problem: Problem, change: str) -> str:
    """Of the ValueError that a rank raises."""
    rank = dist.get_rank()
    part = problem.part(rank)
    options = {}
    try:
        if change == "other cuts":
            VocabularyShards.of(dist.group.WORLD, part.weight, torch.zeros((20, 11)[rank], 3))
        if change == "empty":
            VocabularyShards.of(dist.group.WORLD, part.weight[: 16 - 16 * rank])
        shards = VocabularyShards.of(dist.group.WORLD, part.weight, part.teacher.weight)
        if change == "no teacher":
            shards = VocabularyShards.of(dist.group.WORLD, part.weight)
        if change == "another weight":
            part.weight = part.weight[1:]
        if change == "another teacher":
            part.teacher = replace(part.teacher, weight=part.teacher.weight[1:])
        if change == "topk":
            part.teacher = TopKTeacher(torch.zeros(7, 2), torch.zeros(7, 2, dtype=torch.int64))
        if change == "label":
            part.labels[3] = 31
        if change == "backend":
            options["backend"] = "cpp"
        linear_distillation_loss(
            part.hidden, part.weight, part.teacher, part.labels, Objective(), vocabulary_shards=shards, **options
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            "other cuts",
            [r"cut at the same token ids; rows of the student's parts \(16, 15\), of the teacher's \(20, 11"] * 2,
        ),
        ("empty", [r"each rank needs a row of each lm_head; student's \(16, 0\)"] * 2),
        ("no teacher", ["vocabulary_shards was made without a teacher"] * 2),
        ("another weight", [f"student_weight has {rows - 1} rows, and vocabulary_shards {rows}" for rows in (16, 15)]),
        (
            "another teacher",
            [f"teacher's part has {rows - 1} entries, and vocabulary_shards {rows}" for rows in (16, 15)],
        ),
        ("topk", ["vocabulary_shards takes a DenseTeacher or a LinearTeacher, got a TopKTeacher"] * 2),
        ("label", ["label 31 at token 3 is outside the student's vocabulary of 31"] * 2),
        ("backend", ['vocabulary_shards needs backend "auto"'] * 2),
    ],
)
def test_parts_that_do_not_fit_are_refused_on_every_rank(two_ranks, change, messages):
    for got, want in zip(two_ranks(message_of, some_problem((16,)), change), messages, strict=True):
        assert re.search(want, got)


# tensors of the "meta" device have no values: what would wait for one raises
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_waits_for_a_gpu_but_the_communication(monkeypatch, divergence):
    monkeypatch.setattr(vocabulary_shards, "_resolve_process_group", lambda name: name)
    monkeypatch.setattr(vocabulary_shards, "_all_gather", lambda x, group: [x, x])
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: None)
    with torch.device("meta"):
        logits = torch.zeros(5, 8)
        _, stats, _ = vocabulary_shards.VocabularyShard("a group", [9, 8]).distillation_rows(
            logits,
            torch.zeros(5, 8, dtype=torch.bfloat16),
            Tokens(torch.zeros(5, dtype=torch.int64), torch.ones(1), torch.ones(5), torch.ones(5)),
            Settings(divergence, 0.3, 2, -100, [1.0, 20.0, 0.5, 0.0], "bucket"),
            needs_grad=True,
            reduced=True,
            grad=logits,
        )
    assert (stats.shape, stats.device.type) == ((7, 5), "meta")
