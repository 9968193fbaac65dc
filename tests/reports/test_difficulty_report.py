"""What the rank step shows of the measured difficulty: its table, its picture and the samples it picks."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_fast.curriculum.blind_signals import average_ranks
from pocl_fast.curriculum.scores import SignalScores
from pocl_fast.curriculum.signals import Weighted, chosen_signals
from pocl_fast.curriculum.stages import baby_steps
from pocl_fast.options.run import RunConfig
from pocl_fast.reports.difficulty_report import (
    Ranked,
    difficulty_figure,
    difficulty_table,
    ordinal_ranks,
    read_ranked,
    sample_rows,
    stage_rows,
    tie_lines,
)
from pocl_fast.settings.configuration import to_yaml
from pocl_fast.system.errors import InputError


def ranked(signals="rouge_l,cross_entropy", scores=None, count=40, stages=4):
    """Samples 3, 5, 7, ... with random scores."""
    chosen = tuple(chosen_signals(signals))
    rng = np.random.default_rng(0)
    arrays = tuple(scores or [rng.random(count) for _ in chosen])
    index = 3 + 2 * np.arange(len(arrays[0]))
    known = SignalScores(index, chosen, arrays)
    fused = known.fused(60.0, "average")
    return Ranked(known, baby_steps(index[fused.order], fused.score[fused.order], stages=stages), 60.0)


def test_each_sample_has_the_stage_that_brings_it_in():
    made = ranked(count=43)
    for stage, new in enumerate(made.new_samples()):
        assert len(new) == (10 if stage < 3 else 13)
        assert set(made.known.index[made.stage_of == stage]) == set(new)


def test_the_table_has_the_means_of_what_each_stage_brings_in():
    made = ranked(scores=[np.array([1.0, 0.5, 0.25, np.nan]), np.array([1.0, 2.0, 3.0, 4.0])], stages=2)
    assert [row.means for row in stage_rows(made)] == [["0.750", "1.500"], ["0.250", "3.500"]]
    lines = difficulty_table(made).splitlines()
    assert lines[0] == "rank: 4 samples in 2 stages, easy to hard; each stage adds new samples"
    words = "stage samples new temperature alpha mean rouge_l mean cross_entropy"
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        words,
        "1 2 2 1 0.3 0.750 1.500",
        "2 4 2 2 0 0.250 3.500",
    ]
    assert len({len(line) for line in lines[1:4]}) == 1  # the columns are aligned
    assert lines[4:6] == [
        "rouge_l: ROUGE-L of the student's answer (high is easy)",
        "cross_entropy: cross-entropy of the reference, nats a token (low is easy)",
    ]
    assert lines[6] == "rank correlation of rouge_l and cross_entropy: 1.00 (1: they rank the samples alike)"


def test_a_stage_that_adds_no_samples_has_no_means():
    made = ranked(scores=[np.array([1.0, 0.5]), np.array([1.0, 2.0])], stages=2)
    stages = tuple(replace(stage, size=2) for stage in made.curriculum.stages)
    rows = stage_rows(replace(made, curriculum=replace(made.curriculum, stages=stages)))
    assert [(row.new, row.means) for row in rows] == [(2, ["0.750", "1.500"]), (0, ["-", "-"])]


def test_a_long_name_of_a_signal_keeps_its_end_and_the_columns_aligned():
    made = ranked("cross_entropy_gap,teacher_cross_entropy")
    long = replace(made.known.signals[0].signal, name="a.package.of.many.modules:a_function")
    known = replace(made.known, signals=(Weighted(long), made.known.signals[1]))
    lines = difficulty_table(replace(made, known=known)).splitlines()
    assert "mean of.many.modules:a_function" in lines[1]
    assert len({len(line) for line in lines[1:6]}) == 1  # aligned


def test_average_ranks_share_ties_and_put_nan_last():
    assert average_ranks(np.array([2.0, 1.0, 2.0, np.nan, 2.0, 0.0])).tolist() == [4.0, 2.0, 4.0, 6.0, 4.0, 1.0]
    assert ordinal_ranks(np.array([2.0, 1.0, 2.0, np.nan, 0.0])).tolist() == [3, 2, 4, 5, 1]


def test_the_correlation_is_spearman_s_in_the_signals_directions():
    # Spearman's rho of these by hand: ranks 1 2 3 4 against 2 1 3 4, 1 - 6 * 2 / (4 * 15)
    made = ranked(scores=[np.array([4.0, 3.0, 2.0, 1.0]), np.array([2.0, 1.0, 3.0, 4.0])], stages=1)
    assert made.rank_correlation == 0.8
    assert ranked("cross_entropy,mean_kl", scores=[np.arange(9.0), -np.arange(9.0)]).rank_correlation == -1.0
    assert ranked("mean_kl").rank_correlation is None
    assert ranked(scores=[np.zeros(9), np.arange(9.0)]).rank_correlation is None


def test_the_table_says_how_many_samples_share_a_score_and_whose_stage_the_file_decides():
    rouge, loss = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.1]), np.array([1.0, 2.0, 2.0, 2.0, 3.0, 4.0])
    shares = "largest group of samples with one score: rouge_l 66.7 %, cross_entropy 50 %"
    made = ranked(scores=[rouge, loss], stages=2)  # samples 1, 2 and 3 are alike; the cut is behind the third
    follow = "samples share their fused score with others and follow the file's order among these, which decides"
    assert tie_lines(made) == [shares, f"3 of 6 {follow} the stage of 3"]
    assert difficulty_table(made).splitlines()[-2:] == tie_lines(made)
    assert tie_lines(ranked(scores=[rouge, loss], stages=6))[1] == f"3 of 6 {follow} the stage of 3"
    assert tie_lines(ranked(scores=[rouge, np.arange(6.0)], stages=2))[1] == f"0 of 6 {follow} the stage of 0"
    assert tie_lines(ranked(scores=[rouge, loss], stages=1)) == [shares]  # an order that decides nothing


# one signal has no ranks to compare; two have cuts; of four, three histograms are drawn
@pytest.mark.parametrize(
    ("signals", "panels"),
    [
        ("rouge_l", 1),
        ("rouge_l,cross_entropy", 3),
        ("rouge_l,mean_kl,cross_entropy=2", 4),
        ("rouge_l,mean_kl,answer_length,cross_entropy", 4),
    ],
)
def test_the_picture_has_a_histogram_of_all_samples_for_each_signal(signals, panels, tmp_path):
    figure = difficulty_figure(ranked(signals))
    assert len(figure.axes) == panels
    for axis in figure.axes[: len(signals.split(",")) if panels < 4 else 3]:
        assert sum(bar.get_height() for bar in axis.patches) == 40
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"stage {stage}: 10 new samples" for stage in (1, 2, 3, 4)
    ]
    figure.savefig(tmp_path / "difficulty.png")


@pytest.mark.parametrize("weights", ["rouge_l,cross_entropy", "rouge_l=3,cross_entropy"])
def test_the_cuts_in_the_picture_part_the_stages(weights):
    figure = difficulty_figure(made := ranked(weights, count=400))
    axis = figure.axes[-1]
    first, second = (ordinal_ranks(hardness) for hardness in made.hardness(400))
    assert len(axis.lines) == 3
    for stage, line in enumerate(axis.lines):
        x, y = line.get_data()
        cut = np.interp(first, x[~np.isnan(y)], y[~np.isnan(y)], left=np.inf, right=-np.inf)
        inside = (second < cut - 2) & np.isfinite(cut)  # 2 ranks, for the line is made of pieces
        outside = (second > cut + 2) & np.isfinite(cut)
        assert inside.sum() > 10
        assert made.stage_of[inside].max() <= stage
        assert made.stage_of[outside].min() > stage


def test_equal_and_missing_scores_have_a_picture(tmp_path):
    for scores in ([np.zeros(8), np.full(8, np.nan)], [np.full(8, np.inf), np.arange(8.0)]):
        difficulty_figure(ranked(scores=scores)).savefig(tmp_path / "difficulty.png")


def test_of_many_samples_the_picture_draws_some_and_counts_all():
    figure = difficulty_figure(ranked(count=100_000))
    points = np.concatenate([dots.get_offsets() for dots in figure.axes[-1].collections])
    assert 2000 < len(points) < 10_000
    assert 99_000 < points.max() <= 100_000
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 100_000


def write_run(folder, made):
    (folder / "config.yaml").write_text(to_yaml(RunConfig()))
    names = [one.signal.name for one in made.known.signals]
    texts = {name: [f"{name} {i}" for i in made.known.index] for name in ("prompt", "reference", "answer")}
    columns = {"index": made.known.index} | dict(zip(names, made.known.scores, strict=True)) | texts
    pq.write_table(pa.table(columns), folder / "difficulty.parquet")
    made.curriculum.save(folder / "curriculum.json")


def test_the_easiest_the_middle_and_the_hardest_sample_of_each_stage_are_shown(tmp_path):
    made = ranked(count=13)  # 3 in each stage, 4 in the last
    write_run(tmp_path, made)
    shown = sample_rows(read_ranked(tmp_path), tmp_path / "difficulty.parquet")
    order = made.curriculum.order
    picked = [int(order[i]) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)]
    assert [(row.stage, row.prompt) for row in shown] == [
        (1 + i // 3, f"prompt {index}") for i, index in enumerate(picked)
    ]
    row = int(np.flatnonzero(made.known.index == picked[0])[0])
    assert shown[0].scores == [f"{scores[row]:.3f}" for scores in made.known.scores]
    assert (shown[0].reference, shown[0].answer) == (f"reference {picked[0]}", f"answer {picked[0]}")


def test_a_stage_of_one_sample_shows_it_once(tmp_path):
    write_run(tmp_path, made := ranked(count=4))
    shown = sample_rows(read_ranked(tmp_path), tmp_path / "difficulty.parquet")
    assert [row.prompt for row in shown] == [f"prompt {i}" for i in made.curriculum.order]


def test_before_ranking_there_is_nothing_and_other_samples_are_one_clear_error(tmp_path):
    write_run(tmp_path, ranked(count=8))
    ranked(count=9).curriculum.save(tmp_path / "curriculum.json")
    with pytest.raises(InputError, match=r"ranks other samples than .* run `pocl-fast rank` again"):
        read_ranked(tmp_path)
    (tmp_path / "curriculum.json").unlink()
    assert read_ranked(tmp_path) is None
