"""A −inf logit is probability 0 on its own side alone, in the Triton kernels: rows as filters and masks make them.

Against the float64 reference and its gradient; with tiles of 128 logits, so that a short row has several. What the
backends share of it: test_dense.py, test_sparse.py.
"""

import math

import pytest
import sparse_compare
import torch
from compare import both, logits, relative_error
from sparse_compare import case

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import TAILS, LinearTeacher

pytestmark = [
    pytest.mark.usefixtures("triton_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
V = 149
KINDS = ("forward_kl", "reverse_kl", "jsd")  # of formulas where something is left out


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    tiles = pytest.importorskip("pocl_fast.kernels.tiles")
    monkeypatch.setattr(tiles, "choose_tile", lambda *_: tiles.Tile(32, 4, 1))


def top_k(x, k):
    return torch.where(x >= x.topk(k, -1).values[..., -1:], x, -math.inf)


def top_p(x, share):
    values, order = x.sort(-1, descending=True)
    before = torch.softmax(values, -1).cumsum(-1) - torch.softmax(values, -1)
    return torch.empty_like(x).scatter(-1, order, torch.where(before < share, values, -math.inf))


def only(x, *places):
    return torch.full_like(x, -math.inf).index_copy(-1, torch.tensor(places), x[..., list(places)])


def filtered_rows():
    """Pairs of rows, each kind once; the last is compared where nothing is left out."""
    s, t = logits(10, V), logits(10, V)
    t[0] = top_p(t[0], 0.9)
    s[1] = top_k(s[1], 20)
    s[2], t[2] = top_k(s[2], 30), top_p(t[2], 0.95)
    s[3], t[3] = top_p(s[3], 0.9), top_k(t[3], 3)
    s[4] = only(s[4], 7)
    t[5] = only(t[5], 7)
    s[6, 140:], t[6, 140:] = -math.inf, -math.inf  # a padded vocabulary
    s[7] = top_k(t[7] + 0.01 * logits(V, spread=1.0), 110)  # near each other but for what is left out
    t[8] = top_k(s[8] + 0.01 * logits(V, spread=1.0), 110)
    return s, t


def assert_rows_match(student, teacher, labels, objective, **options):
    """Each token's values, and the gradient of all."""
    got, gradient, want, exact = both(student, teacher, labels, objective, backend="triton", **options)
    for name, values in want.per_token.items():
        torch.testing.assert_close(
            got.per_token[name].double(), values, rtol=2e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert relative_error(gradient, exact) <= 1e-5
    return got, want


@pytest.mark.parametrize(
    ("divergence", "temperature", "alpha"),
    [
        *((divergence, 1.0, 0.3) for divergence in DIVERGENCES),
        *(pytest.param(divergence, 1.5, 0.0, marks=pytest.mark.full) for divergence in DIVERGENCES),
    ],
)
def test_filtered_teachers_and_students_match(divergence, temperature, alpha):
    student, teacher = filtered_rows()
    labels = student.argmax(-1)
    assert_rows_match(student, teacher, labels, Objective(divergence, temperature=temperature, alpha=alpha, beta=0.3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_filtered_teacher_has_its_true_value(divergence):
    """A teacher of 0.5, 0.3, 0.2, 0, 0 against a student with 0.9 of its mass elsewhere."""
    teacher = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]]).log()
    student = torch.tensor([[0.05, 0.03, 0.02, 0.6, 0.3]]).log()
    objective = Objective(divergence, temperature_scaling="none")
    got, _, _, _ = both(student, teacher, torch.tensor([0]), objective, backend="triton")
    p, q = teacher.double().exp(), student.double().exp()
    m = {"skew_forward_kl": 0.1 * p + 0.9 * q, "skew_reverse_kl": 0.9 * p + 0.1 * q}.get(divergence, 0.5 * (p + q))
    of_p, of_q = torch.xlogy(p, p / m).sum(), (q * (q / m).log()).sum()
    want = {
        "forward_kl": math.log(10),
        "reverse_kl": 0.1 * math.log(0.1),  # its infinite terms left out
        "jsd": 0.5 * (of_p + of_q),
        "skew_forward_kl": of_p,
        "skew_reverse_kl": of_q,
        "tvd": 0.9,
    }
    assert float(got.loss.detach()) == pytest.approx(float(want[divergence]), rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_disjoint_supports_and_sides_of_minus_infinity_alone_match(divergence):
    student, teacher = logits(4, V), logits(4, V)
    student[0, :100], teacher[0, 100:] = -math.inf, -math.inf
    teacher[1] = -math.inf
    student[2] = -math.inf
    student[3], teacher[3] = -math.inf, -math.inf
    got, gradient, want, _ = both(student, teacher, torch.tensor([120] * 4), Objective(divergence), backend="triton")
    for name in ("divergence", "student_entropy", "teacher_entropy", "agreement"):
        torch.testing.assert_close(got.per_token[name].double(), want.per_token[name], rtol=2e-6, atol=3e-6)
    assert got.per_token["divergence"][1:].tolist() == [0, 0, 0]
    assert got.per_token["teacher_entropy"][2] > 0  # its own, whatever the student is
    assert gradient[1:].count_nonzero() == 0
    if divergence in ("forward_kl", "reverse_kl"):
        assert got.per_token["divergence"][0] == 0  # no term of it is finite
        assert gradient[0].count_nonzero() == 0


@pytest.mark.parametrize("divergence", KINDS)
def test_small_divergences_keep_their_digits_where_terms_are_left_out(divergence):
    student, teacher = logits(2, V), logits(2, V)
    student[0] = top_k(teacher[0] + 1e-3 * logits(V, spread=1.0), V - 3)
    teacher[1] = top_k(student[1] + 1e-3 * logits(V, spread=1.0), V - 3)
    objective = Objective(divergence)
    got, _, want, _ = both(student, teacher, student.argmax(-1), objective, backend="triton")
    error = (got.per_token["divergence"].double() - want.per_token["divergence"]).abs()
    assert (error <= 2e-6 * want.per_token["divergence"].abs() + 2e-10).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_without_a_gradient_the_divergence_is_the_same(divergence):
    student, teacher = filtered_rows()
    labels, objective = student.argmax(-1), Objective(divergence)
    with_gradient, _, want, _ = both(student, teacher, labels, objective, backend="triton")
    with torch.no_grad():
        got = distillation_loss(student, teacher, labels, objective, backend="triton")
    torch.testing.assert_close(got.per_token["divergence"].double(), want.per_token["divergence"], rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(got.loss, with_gradient.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize(("V_s", "V_t"), [(V + 30, V), pytest.param(V, V + 30, marks=pytest.mark.full)])
def test_unequal_vocabularies_with_minus_infinity_in_the_tail_match(divergence, V_s, V_t):
    student, teacher = logits(3, V_s), logits(3, V_t)
    student[0, -5:], teacher[0, -5:] = -math.inf, -math.inf
    student[1, V - 9 :], teacher[1] = -math.inf, top_p(teacher[1], 0.9)
    student[2], teacher[2, V:] = top_k(student[2], 9), -math.inf
    assert_rows_match(student, teacher, student.argmax(-1), Objective(divergence, temperature=1.3, alpha=0.3))


@pytest.mark.full
@pytest.mark.parametrize("divergence", KINDS)
def test_scaled_and_softcapped_logits_match_where_some_are_minus_infinity(divergence):
    student, teacher = filtered_rows()
    options = {"logit_scale": 0.5, "logit_softcap": 5.0, "teacher_logit_softcap": 30.0}
    assert_rows_match(student[:4], teacher[:4], student[:4].argmax(-1), Objective(divergence, alpha=0.3), **options)


@pytest.mark.parametrize(
    ("divergence", "bad"),
    [
        ("forward_kl", math.nan),
        ("jsd", math.inf),
        *(pytest.param(name, math.nan, marks=pytest.mark.full) for name in DIVERGENCES if name != "forward_kl"),
    ],
)
def test_a_nan_shows_whatever_the_other_side_is(divergence, bad):
    student, teacher = logits(4, V), logits(4, V)
    student[0], teacher[0, 3] = -math.inf, bad
    student[1, 3], teacher[1] = bad, -math.inf
    student[2, 3], teacher[2, 3] = -math.inf, bad
    student[3], teacher[3] = top_k(student[3], 9), top_p(teacher[3], 0.9)
    got, _, want, _ = both(student, teacher, student.nan_to_num().argmax(-1), Objective(divergence), backend="triton")
    assert want.per_token["divergence"].isnan().tolist() == [True, True, True, False]
    assert got.per_token["divergence"].isnan().tolist() == [True, True, True, False]


def test_a_label_of_minus_infinity_costs_infinitely_much_and_leaves_the_divergence_alone():
    student, teacher = filtered_rows()
    student, teacher = student[1:3], teacher[1:3]
    labels = student.argmin(-1)
    assert (student.gather(1, labels[:, None]) == -math.inf).all()
    got, _ = assert_rows_match(student, teacher, labels, Objective("jsd", alpha=0.0))
    assert got.per_token["ce"].tolist() == [math.inf, math.inf]
    assert got.loss.isfinite()


def test_the_linear_loss_leaves_no_entry_out_that_a_bias_of_minus_infinity_masks():
    """The teacher's bias masks half of its vocabulary: hidden states and lm_heads, not logits, are given."""
    labels = torch.tensor([3, 5, -100])
    given = [torch.randn(*shape) for shape in ((3, 8), (40, 8), (3, 6), (40, 6))]
    bias = torch.where(torch.arange(40) % 2 == 0, -math.inf, 0.0)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        hidden, weight, t_hidden, t_weight = (x.detach().clone().to(dtype) for x in given)
        leaves = [hidden.requires_grad_(True), weight.requires_grad_(True)]
        teacher = LinearTeacher(t_hidden, t_weight, bias.to(dtype))
        out = linear_distillation_loss(*leaves, teacher, labels, Objective("tvd", alpha=0.3), backend=backend)
        out.loss.backward()
        results.append([out.loss, out.divergence, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-5


# ---- K entries of the teacher ----


@pytest.mark.parametrize(
    "divergence",
    ["forward_kl", "reverse_kl", "jsd", *(pytest.param(name, marks=pytest.mark.full) for name in DIVERGENCES[3:])],
)
@pytest.mark.parametrize("tail", TAILS)
def test_listed_entries_that_the_student_lacks_have_their_mass(divergence, tail):
    """And students without a rest, without an entry, teachers without one, of all the mass or of too much."""
    arguments = case(8, V, 8, temperature=1.3)
    student, log_probs, indices, labels = arguments[:4]
    labels[:] = V - 1
    student[:, V - 1] = 1.0
    student[0, indices[0, :3]] = -math.inf
    student[1, indices[1]] = -math.inf
    log_probs[2, 3:] = -math.inf
    student[2, indices[2, :2]] = -math.inf
    student[3], labels[3] = only(student[3], *indices[3].tolist()), indices[3, 0]
    log_probs[4] = -math.inf
    log_probs[5] = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.01]).log()  # 1.01: no rest
    student[6], labels[6] = only(student[6], int(indices[6, 2])), indices[6, 2]
    sparse_compare.assert_matches("triton", arguments, divergence, tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("values", [torch.exp, lambda x: x + 30])
def test_what_is_no_log_probability_makes_its_row_nan(tail, values):
    """Where nobody can look into the tensor before the kernel: probabilities and logits of a GPU."""
    arguments = case(3, V, 8)
    clean, _ = sparse_compare.run("triton", arguments, "jsd", tail)
    arguments.log_probs[1] = values(arguments.log_probs[1])
    stats, _ = sparse_compare.run("triton", arguments, "jsd", tail)
    assert stats[0].isnan().tolist() == [False, True, False]
    assert torch.equal(stats[:, 0], clean[:, 0])
