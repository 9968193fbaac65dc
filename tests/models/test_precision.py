"""In what precision matrix products are computed."""

import pytest
import torch
from precise import relative_error
from ranks import gloo

from pocl_fast.loss import cpp
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.lm_head_products import cpp_products, set_bf16_way
from pocl_fast.loss.objective import Objective
from pocl_fast.models import precision
from pocl_fast.models.precision import PRECISION_FILE, Precision, choose_precision, exact_backward, exact_products
from pocl_fast.models.product_speed import CpuProducts, Shapes, Speeds
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError


def test_precision_on_a_cpu_is_what_was_asked_for_and_autocast_is_off():
    chosen = choose_precision("fp32", torch.device("cpu"))
    assert chosen.name == "fp32"
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("rounds", [False, True])
def test_fp32_products_on_a_cpu_are_exact_by_whichever_library_is_faster(monkeypatch, rounds):
    if rounds:  # as with AMX
        monkeypatch.setattr("pocl_fast.models.precision.rounds_to_bf16", lambda: True)
    choose_precision("fp32", torch.device("cpu"))
    a, b = torch.randn(2, 300, 300)
    want = a.double() @ b.double()
    assert ((a @ b).double() - want).norm() < 1e-6 * want.norm()
    if rounds:
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_a_frozen_model_computes_in_bf16_only_where_that_was_chosen_and_is_in_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        assert Precision("bf16", cpu).frozen_dtype == (torch.bfloat16 if supported else torch.float32)
    assert Precision("fp32", cpu).frozen_dtype == Precision("bf16", torch.device("cuda")).frozen_dtype == torch.float32


@pytest.mark.parametrize("mode_rounds", [False, True])
def test_bf16_that_is_asked_for_rounds_layers_that_train_where_no_mode_does(monkeypatch, mode_rounds):
    cpu = torch.device("cpu")
    monkeypatch.setattr(precision, "rounds_to_bf16", lambda: mode_rounds)
    for supported in (True, False):
        monkeypatch.setattr(precision, "_multiplies_bf16", lambda answer=supported: answer)
        asked = Precision("bf16", cpu)
        assert asked.rounds_layers == (supported and not mode_rounds)
        assert asked.of_training == ("bf16" if supported or mode_rounds else "fp32")
    monkeypatch.setattr(precision, "_has_bf16", lambda: False)
    assert not Precision("bf16", cpu, CpuProducts("rounded", "bf16", "bf16")).rounds_layers  # chosen on another one
    assert not Precision("fp32", cpu).rounds_layers
    assert not Precision("bf16", torch.device("cuda")).rounds_layers


@pytest.mark.parametrize("rounds", [False, True])
def test_a_model_trains_with_rounded_products_where_that_was_chosen(rounds):
    chosen = Precision("bf16", torch.device("cpu"), CpuProducts("rounded" if rounds else "ieee", "bf16", "bf16"))
    layer, x = torch.nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    want = x.double() @ layer.weight.double().t()
    with chosen.training(layer), chosen.head_products(layer.weight):
        error = relative_error(layer(x), want)
        assert torch.is_autocast_enabled("cpu") == (rounds and cpp.has_products())
    assert (error > 1e-4) == rounds
    assert relative_error(layer(x), want) < 1e-6


@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_an_lm_head_is_rounded_only_where_its_products_are_faster_so(modes_as_before, way):
    """Else its hidden states alone would be, and nothing be gained."""
    chosen = Precision("bf16", torch.device("cpu"), CpuProducts("rounded", "bf16", way))
    chosen.set_modes()
    hidden, weight = torch.randn(16, 64), torch.randn(500, 64)
    labels = torch.arange(16)
    want = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels)
    with chosen.head_products(weight):
        loss = linear_distillation_loss(hidden, weight, None, labels, Objective(alpha=1.0)).loss
    rounded = way == "bf16" and cpp.has_products()
    assert (relative_error(loss, want) > 1e-6) == rounded


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        (CpuProducts("rounded", "fp32", "fp32"), "fp32"),
        (CpuProducts("rounded", "bf16", "fp32"), "bf16"),
        (CpuProducts("ieee", "bf16", "fp32"), "bf16"),
    ],
)
def test_a_teachers_outputs_are_named_by_what_computes_them(chosen, name):
    assert Precision(chosen.name, torch.device("cpu"), chosen).of_teacher == name


def test_attentions_products_are_exact_within_their_block_and_the_mode_comes_back():
    choose_precision("bf16", torch.device("cpu"))
    try:
        with exact_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        choose_precision("fp32", torch.device("cpu"))


def test_attentions_products_are_exact_on_the_way_back_too_and_the_mode_comes_back():
    choose_precision("bf16", torch.device("cpu"))
    inside = []

    def attention(q, k):
        taken = [x.view_as(x) for x in (q, k)]
        product = taken[0] @ taken[1]
        product.register_hook(lambda _: inside.append(torch.backends.mkldnn.matmul.fp32_precision))
        output = product * 3
        exact_backward(output, *taken)
        return output

    try:
        for needs in ((True, True), (True, False), (False, True)):
            tensors = [torch.randn(4, 4, requires_grad=need) for need in needs]
            output = attention(*tensors)
            output.sum().backward()
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert inside == ["ieee"] * 3
        leaf, other = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        product = leaf @ other
        output = product * 3
        exact_backward(output, leaf, other)
        torch.autograd.grad(output.sum(), product)  # which ends before an input has a gradient
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        choose_precision("fp32", torch.device("cpu"))


# ---- "auto" on a CPU ----


@pytest.fixture
def modes_as_before():
    yield
    choose_precision("fp32", torch.device("cpu"))
    set_bf16_way(None)


@pytest.fixture
def timing(monkeypatch, modes_as_before):
    """What timing is to say of this processor, which multiplies bf16: `timing("bf16")`. The list of timings."""
    made = []
    monkeypatch.setattr(precision, "_has_bf16", lambda: True)

    def says(faster):
        both = {"fp32": 100.0, "bf16": 200.0 if faster == "bf16" else 50.0}
        found = Speeds({"ieee": 100.0, "bf16": 100.0, "rounded": both["bf16"]}, both, both, rounds=False)
        monkeypatch.setattr(precision, "measure_speeds", lambda shapes: made.append(shapes) or found)
        return made

    return says


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_auto_on_a_cpu_takes_what_is_faster_and_says_so(timing, faster):
    timing(faster)
    said = []
    chosen = choose_precision("auto", torch.device("cpu"), say=said.append)
    assert chosen.name == faster
    assert chosen.frozen_dtype == (torch.bfloat16 if faster == "bf16" else torch.float32)
    assert chosen.rounds_layers == (faster == "bf16")
    [line] = said
    assert line.startswith(f"precision: {faster} for layers that do not train")
    weight = torch.zeros(4, 2, dtype=torch.bfloat16)
    assert (cpp_products(torch.bfloat16, weight) is not None) == (faster == "bf16" and cpp.has_products())


@pytest.mark.parametrize("first", ["fp32", "bf16"])
def test_a_choice_is_kept_and_taken_again_where_timing_would_now_say_the_opposite(timing, tmp_path, first):
    timing(first)
    began = choose_precision("auto", torch.device("cpu"), tmp_path, say=lambda _: None)
    timed, said = timing("bf16" if first == "fp32" else "fp32"), []
    resumed = choose_precision("auto", torch.device("cpu"), tmp_path, say=said.append)
    assert resumed == began
    assert (resumed.name, resumed.of_teacher) == (first, first)
    assert len(timed) == 1
    assert said == [
        f"precision: {first} for layers that do not train and {first} for weights that do, which an earlier step chose"
        f" ({PRECISION_FILE})"
    ]


def test_what_is_asked_for_is_not_timed_whatever_was_kept(timing, tmp_path):
    timed = timing("bf16")
    choose_precision("auto", torch.device("cpu"), tmp_path, say=lambda _: None)
    assert choose_precision("fp32", torch.device("cpu"), tmp_path).name == "fp32"
    assert len(timed) == 1


def test_a_file_that_holds_no_choice_is_refused(timing, tmp_path):
    timing("bf16")
    for text in ("", '{"layers": "bf16"}'):
        (tmp_path / PRECISION_FILE).write_text(text)
        with pytest.raises(InputError, match=f"{PRECISION_FILE} holds no choice of a precision.*delete it"):
            choose_precision("auto", torch.device("cpu"), tmp_path)


def test_small_layers_and_processors_without_bf16_stay_fp32_untimed(timing, tmp_path, monkeypatch):
    timed, said = timing("bf16"), []
    small = choose_precision("auto", torch.device("cpu"), tmp_path, shapes=lambda: Shapes(32, 64, 259), say=said.append)
    monkeypatch.setattr(precision, "_has_bf16", lambda: False)
    old = choose_precision("auto", torch.device("cpu"), tmp_path, say=said.append)
    assert small.name == old.name == "fp32"
    assert [line.split(",")[0] for line in said] == ["precision: fp32", "precision: fp32"]
    assert timed == []
    assert list(tmp_path.iterdir()) == []


def _opposite_choices(folder):
    """Each rank's timing says something else."""
    faster = ("bf16", "fp32")[ranks.rank()]
    both = {"fp32": 100.0, "bf16": 200.0 if faster == "bf16" else 50.0}
    found = Speeds({"ieee": 100.0, "bf16": 100.0, "rounded": both["bf16"]}, both, both, rounds=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "measure_speeds", lambda _: found)
        patch.setattr(precision, "_has_bf16", lambda: True)
        chosen = choose_precision("auto", torch.device("cpu"), folder, say=lambda _: None)
        choose_precision("fp32", torch.device("cpu"))
    return chosen.name


@gloo
def test_all_ranks_take_the_first_ones_choice(two_ranks, tmp_path):
    assert two_ranks(_opposite_choices, tmp_path) == ["bf16", "bf16"]
