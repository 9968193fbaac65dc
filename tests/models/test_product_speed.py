"""Which precision a CPU multiplies in, from how fast it is in each."""

from types import SimpleNamespace

import pytest
from tiny import tiny_model

from pocl_fast.models import product_speed
from pocl_fast.models.product_speed import CpuProducts, Shapes, Speeds, decide, describe, measure_speeds


def speeds(*, mkl=100.0, onednn=100.0, rounded=50.0, fp32=100.0, bf16=100.0, slices=100.0, head=100.0, rounds=False):
    trained = {"ieee": mkl, "bf16": onednn, "rounded": rounded}
    return Speeds(trained, {"fp32": fp32, "bf16": bf16}, {"fp32": slices, "bf16": head}, rounds)


def test_a_xeon_whose_bf16_products_are_slower_multiplies_in_fp32():
    chosen = decide(speeds(mkl=245, onednn=230, rounded=140, fp32=245, bf16=161, slices=245, head=161))
    assert chosen == CpuProducts("ieee", "fp32", "fp32")
    assert chosen.name == "fp32"


def test_where_bf16_is_faster_it_is_taken():
    assert decide(speeds(mkl=245, onednn=900, bf16=900, head=700, rounds=True)) == CpuProducts("bf16", "bf16", "bf16")


def test_where_no_mode_rounds_weights_that_train_are_rounded_by_us():
    chosen = decide(speeds(mkl=75, onednn=90, rounded=150, fp32=95, bf16=170, slices=70, head=135))  # a Zen 4
    assert chosen == CpuProducts("rounded", "bf16", "bf16")
    assert (chosen.name, chosen.mode) == ("bf16", "bf16")


def test_layers_that_do_not_train_may_be_bf16_where_those_that_train_are_not():
    chosen = decide(speeds(mkl=75, onednn=90, rounded=80, fp32=95, bf16=170, slices=70, head=135))
    assert chosen == CpuProducts("bf16", "bf16", "bf16")


def test_a_mode_that_rounds_is_left_for_more_than_five_percent():
    assert decide(speeds(mkl=245, onednn=900, rounded=940, rounds=True)).trained == "bf16"
    assert decide(speeds(mkl=245, onednn=900, rounded=950, rounds=True)).trained == "rounded"


# 5 %: both sides of the margin
@pytest.mark.parametrize(("faster", "taken"), [(104.9, "fp32"), (105.1, "bf16")])
def test_bf16_is_taken_for_more_than_five_percent(faster, taken):
    chosen = decide(speeds(onednn=faster, bf16=faster, head=faster, rounds=True))
    assert chosen == CpuProducts("ieee" if taken == "fp32" else "bf16", taken, taken)


@pytest.mark.parametrize(("faster", "taken"), [(104.9, "bf16"), (105.1, "ieee")])
def test_where_no_mode_rounds_the_default_library_is_taken_for_more_than_five_percent(faster, taken):
    assert decide(speeds(mkl=faster)).trained == taken


@pytest.mark.parametrize("rounds", [False, True])
def test_the_name_says_whether_anything_is_rounded(monkeypatch, rounds):
    monkeypatch.setattr(product_speed, "rounds_to_bf16", lambda: rounds)
    assert CpuProducts("ieee", "fp32", "bf16").name == "fp32"
    assert CpuProducts("ieee", "bf16", "fp32").name == "bf16"
    assert CpuProducts("bf16", "fp32", "fp32").name == ("bf16" if rounds else "fp32")
    assert CpuProducts("rounded", "fp32", "fp32").name == "bf16"


def test_the_line_gives_the_choice_and_all_speeds():
    slow = speeds(mkl=245, onednn=230, rounded=140, fp32=245, bf16=161)
    assert describe(decide(slow), slow) == (
        "precision: fp32 for layers that do not train: their products run at 245 GFLOP/s a core here, bf16 at 161;"
        " for weights that train fp32 by torch's default library: 245 GFLOP/s a core here, fp32 by oneDNN at 230,"
        " bf16 by rounding layers at 140"
    )
    fast = speeds(mkl=245, onednn=900, rounded=800, fp32=250, bf16=950, rounds=True)
    assert (
        "for weights that train bf16 by oneDNN's mode: 900 GFLOP/s a core here, fp32 by torch's default library at 245,"
        " bf16 by rounding layers at 800"
    ) in describe(decide(fast), fast)


def test_every_way_is_timed_for_a_model_of_any_size():
    for shapes in (Shapes(), Shapes(4096, 14336, 152_000), Shapes(70, 1000, 300)):
        found = measure_speeds(shapes)
        assert all(speed > 0 for part in (found.trained, found.layers, found.head) for speed in part.values())
        assert found.trained.keys() == {"ieee", "bf16", "rounded"}
        assert found.layers.keys() == {"fp32", "bf16"}


def test_sizes_are_a_configurations_and_small_layers_are_known():
    assert Shapes.of(tiny_model().config) == Shapes(32, 64, 259)
    assert Shapes.of(tiny_model().config).are_small
    assert not Shapes().are_small
    one_a_layer = SimpleNamespace(hidden_size=32, intermediate_size=[64, 128])
    assert Shapes.of(SimpleNamespace(get_text_config=lambda: one_a_layer)) == Shapes(32, 128, Shapes().vocabulary)


@pytest.mark.parametrize("record", [[], {"trained": "ieee"}, {"trained": "tf32", "layers": "fp32", "head": "fp32"}])
def test_a_record_that_is_none_is_refused(record):
    with pytest.raises(ValueError, match=r"tf32|ieee|\[\]"):
        CpuProducts.from_json(record)
