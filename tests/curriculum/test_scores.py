"""The rank step's reading of a difficulty table, and the fusion of what it read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_fast.curriculum import scores
from pocl_fast.curriculum.fusion import reciprocal_rank_fusion
from pocl_fast.curriculum.scores import SignalScores, read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.system.errors import InputError


def write_table(path, count=1000, **columns):
    rng = np.random.default_rng(0)
    made = {
        "index": np.cumsum(rng.integers(1, 3, count)),  # with gaps, as where samples were left out
        "rouge_l": rng.random(count).round(2),
        "cross_entropy": rng.random(count),
        "answer": [f"answer {i}" for i in range(count)],
    } | columns
    pq.write_table(pa.table(made), path, row_group_size=300)
    return made


def test_scores_are_read_in_pieces_and_fused_by_weight_and_direction(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "ROWS", 64)
    made = write_table(tmp_path / "d.parquet", mean_kl=np.random.default_rng(1).random(1000))
    known = read_scores(tmp_path / "d.parquet", chosen_signals("mean_kl=2,rouge_l"))
    np.testing.assert_array_equal(known.index, made["index"])
    np.testing.assert_array_equal(known.scores[0], made["mean_kl"])
    np.testing.assert_array_equal(known.scores[1], made["rouge_l"])
    want = reciprocal_rank_fusion(
        [made["mean_kl"], made["rouge_l"]], descending=[False, True], weights=[2.0, 1.0], k=7.0, ties="first"
    )
    np.testing.assert_array_equal(known.fused(7.0, "first").order, want.order)
    assert known.missing() == {}


def test_samples_without_a_score_rank_last_and_are_counted(tmp_path):
    write_table(tmp_path / "d.parquet", count=4, cross_entropy=np.array([np.nan, 3.0, 1.0, 2.0]))
    known = read_scores(tmp_path / "d.parquet", chosen_signals("cross_entropy"))
    assert known.missing() == {"cross_entropy": 1}
    assert known.fused(60.0, "average").order.tolist() == [2, 3, 1, 0]


def test_a_function_of_one_s_own_sees_every_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last_digit.py").write_text("def score(record):\n    return int(record['answer'][-1])\n")
    write_table(tmp_path / "d.parquet", count=25)
    known = read_scores(tmp_path / "d.parquet", chosen_signals("last_digit:score"))
    assert known.scores[0].tolist() == [i % 10 for i in range(25)]


def test_a_column_that_was_not_measured_is_one_clear_error(tmp_path):
    write_table(tmp_path / "d.parquet")
    message = r"lacks the columns \['teacher_cross_entropy'\], which --signals rouge_l,cross_entropy_gap reads"
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path / "d.parquet", chosen_signals("rouge_l,cross_entropy_gap"))
    made = pq.read_table(tmp_path / "d.parquet")
    pq.write_table(
        made.select(["index"]).append_column("mean_kl", made["rouge_l"]), tmp_path / "teacher_scores.parquet"
    )
    with pytest.raises(InputError, match=message):  # nor has the teacher's table the column
        read_scores(tmp_path / "d.parquet", chosen_signals("rouge_l,cross_entropy_gap"))


def test_a_missing_damaged_or_foreign_difficulty_table_is_one_clear_error(tmp_path):
    path, chosen = tmp_path / "difficulty.parquet", chosen_signals("rouge_l")
    with pytest.raises(InputError, match="is not there: run `pocl-fast measure` first"):
        read_scores(path, chosen)
    pq.write_table(pa.table({"index": [0], "rouge_l": [0.5]}), path)
    with pytest.raises(InputError, match=r"lacks the columns \['cross_entropy'\]"):
        read_scores(path, chosen)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="is damaged"):
        read_scores(path, chosen)
    write_table(path)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # the first pages
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        read_scores(path, chosen)


def test_the_teacher_s_columns_are_read_from_the_table_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "ROWS", 64)
    made, rng = write_table(tmp_path / "d.parquet"), np.random.default_rng(1)
    beside = {"index": made["index"], "teacher_cross_entropy": rng.random(1000), "mean_kl": rng.random(1000)}
    pq.write_table(pa.table(beside), tmp_path / "teacher_scores.parquet", row_group_size=170)
    known = read_scores(tmp_path / "d.parquet", chosen_signals("mean_kl,cross_entropy_gap,rouge_l"))
    np.testing.assert_array_equal(known.index, made["index"])
    np.testing.assert_array_equal(known.scores[0], beside["mean_kl"])
    np.testing.assert_array_equal(known.scores[1], made["cross_entropy"] - beside["teacher_cross_entropy"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all_columns.py").write_text("def score(record):\n    return record['mean_kl'] + record['rouge_l']\n")
    known = read_scores(tmp_path / "d.parquet", chosen_signals("all_columns:score"))
    np.testing.assert_array_equal(known.scores[0], beside["mean_kl"] + made["rouge_l"])


# one sample fewer; another sample in its place
@pytest.mark.parametrize("change", [lambda index: index[:-1], lambda index: np.r_[index[:-1], index[-1] + 1]])
def test_a_table_of_other_samples_beside_it_is_refused_where_it_is_read(tmp_path, change):
    index = change(write_table(tmp_path / "d.parquet")["index"])
    ones = np.ones(len(index))
    beside = pa.table({"index": index, "teacher_cross_entropy": ones, "mean_kl": ones})
    pq.write_table(beside, tmp_path / "teacher_scores.parquet")
    with pytest.raises(InputError, match=r"teacher_scores.parquet is of other samples"):
        read_scores(tmp_path / "d.parquet", chosen_signals("mean_kl"))
    assert read_scores(tmp_path / "d.parquet", chosen_signals("rouge_l")).missing() == {}


def test_a_signal_by_which_all_samples_are_alike_ranks_none(tmp_path):
    rng = np.random.default_rng(0)
    loss, length = rng.random(9), rng.integers(1, 5, 9).astype(float)
    chosen = tuple(chosen_signals("rouge_l=3,cross_entropy,answer_length"))
    alike = SignalScores(np.arange(9), chosen, (np.zeros(9), loss, length))
    want = reciprocal_rank_fusion([loss, length], descending=[False, False], k=7.0)
    assert alike.constant() == ["rouge_l"]
    np.testing.assert_array_equal(alike.fused(7.0, "average").order, want.order)
    np.testing.assert_array_equal(alike.fused(7.0, "average").score, want.score)
    only = SignalScores(np.arange(9), chosen[:1], (np.zeros(9),))
    assert only.fused(7.0, "average").order.tolist() == list(range(9))  # the order of the file


@pytest.mark.parametrize("score", [0.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("ties", ["average", "first"])
def test_a_signal_without_any_difference_does_not_bring_in_the_order_of_the_file(score, ties):
    loss = np.random.default_rng(0).random(9)
    known = SignalScores(np.arange(9), tuple(chosen_signals("rouge_l=3,cross_entropy")), (np.full(9, score), loss))
    assert known.constant() == ["rouge_l"]
    assert known.fused(60.0, ties).order.tolist() == np.argsort(loss).tolist()
