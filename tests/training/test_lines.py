"""What training prints: each line says where it is, with counts."""

import math

import numpy as np
import pytest
from tiny_training import curriculum_of, trainer_of

from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.training import lines
from pocl_fast.training.state import Best, TrainingState

LOGS = {
    "loss": 2.2741, "ce": 5.793, "divergence": 0.766, "temperature": 1.5, "alpha": 0.25, "agreement": 0.061,
    "tokens_per_second": 1234.5, "supervised_tokens_per_second": 321.0, "memory_gib": 1.255,
}  # fmt: skip


@pytest.fixture
def schedule():
    """Stages of 4 and 8 samples: 2 steps, then 4."""
    curriculum = curriculum_of(8, stages=2, temperatures=[1, 1.5], alphas=[0.25, 0])
    return Schedule(curriculum, dict.fromkeys(range(8), 10), BatchSize(4), epochs=2)


def test_a_place_says_stage_pass_and_step_out_of_how_many(schedule):
    assert lines.where(schedule, 1, 6) == "stage 1/2 epoch 1.00/2 step 1/6"
    assert lines.where(schedule, 3, 6) == "stage 2/2 epoch 0.50/2 step 3/6"
    schedule.stage_steps = 3  # instead of passes
    assert lines.where(schedule, 3, 6) == "stage 1/2 epoch 3.00 step 3/6"


def test_a_training_line_has_the_parts_of_the_loss_and_the_speed():
    want = (
        "here | loss 2.274, CE 5.793, KD 0.766 | τ 1.5, α 0.25 | agreement 6 % | 1,234 tokens/s, 321 of them supervised"
    )
    assert lines.training_line("here", LOGS) == f"{want} | 1.25 GiB"
    generating = lines.training_line("here", LOGS | {"generation_share": 0.5})
    assert generating == f"{want} | 1.25 GiB | 50 % of the time generating"
    skipped = {name: value for name, value in LOGS.items() if name not in ("ce", "divergence", "agreement")}
    assert lines.training_line("here", skipped) == "here | every step since the last line was skipped"


def test_an_evaluation_and_its_answers_are_a_line_each():
    logs = {"eval_rouge_l": 12.345, "eval_cross_entropy": 3.0, "eval_seconds": 2.25}
    assert lines.evaluation_line("here", logs) == "here | dev ROUGE-L 12.35, dev CE 3.000 | 2.2 s"
    assert lines.answer_line("Say\n  7", "7 7") == '    "Say 7" -> "7 7"'
    assert lines.answer_line("x" * 90, "y" * 200) == f'    "{"x" * 47}..." -> "{"y" * 97}..."'


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert lines.answer_line("Say \x1b[31m7", "7\x03") == '    "Say \ufffd[31m7" -> "7\ufffd"'


def test_stages_say_what_they_begin_with_and_what_came_of_them(schedule):
    begins = lines.stage_begins_line(schedule, 1, weights=lines.best_weights(0, 2))
    assert begins == ("stage 2/2 begins: 8 samples, 4 steps, τ 1.5, α 0, from the best weights of stage 1, of step 2")
    state = TrainingState(stage=0, best={0: Best(12.5, 2, 1.0)}, losses={0: 2.5}, seconds={0: 3.04})
    done = lines.stage_done_line(schedule, state, "eval_rouge_l")
    assert done == "stage 1/2 is done: 2 steps in 3.0 s, last loss 2.500, best dev ROUGE-L 12.50 at step 2"
    schedule.end_stage(1, 3)
    converged = "stage 2/2 has converged: no better score in 5 evaluations; it ends after 3 of 4 steps"
    assert lines.converged_line(schedule, 1, 5) == converged


def test_the_table_has_a_row_for_each_stage_that_was_begun(schedule):
    state = TrainingState(stage=0, best={0: Best(12.5, 2, 1.0)}, losses={0: 2.5}, seconds={0: 65.0})
    header, row = lines.training_table(schedule, state).splitlines()
    assert header.split() == ["stage", "samples", "steps", "τ", "α", "loss", "best", "dev", "at", "step", "time"]
    assert row.split() == ["1", "4", "2", "1", "0.25", "2.500", "12.50", "2", "1:05"]
    state.begin(1)
    assert lines.training_table(schedule, state).splitlines()[2].split() == [
        "2", "8", "4", "1.5", "0", "-", "-", "-", "0:00"
    ]  # fmt: skip


def test_the_table_shows_a_long_stage_in_hours(schedule):
    state = TrainingState(stage=0, seconds={0: 75 * 60.0})
    assert lines.training_table(schedule, state).split()[-1] == "1:15:00"


def test_a_training_says_each_event_once_and_where_it_resumes(tmp_path, capsys):
    setting = {"curriculum": curriculum_of(8, stages=2), "max_steps": 1}
    trainer_of(tmp_path, **setting).train()
    assert "training is done" not in capsys.readouterr().out
    trainer_of(tmp_path, **(setting | {"max_steps": -1})).train(resume_from_checkpoint=True)
    said = capsys.readouterr().out.splitlines()
    for start in (
        f"training resumes after step 1 of 3, from {tmp_path / 'checkpoint-1'}",
        "training lines: CE is",
        "stage 1/2 is done: 1 step in ",
        "stage 2/2 begins: 8 samples, 2 steps, τ 2, α 0, from the best weights of stage 1, of step 1",
        "stage 2/2 epoch 1.00/1 step 3/3 | loss ",
        "stage 2/2 epoch 1.00/1 step 3/3 | dev ROUGE-L ",
        "training is done after 3 steps: the student has the best weights of stage 2, of step 3",
    ):
        assert [line.startswith(start) for line in said].count(True) == 1, start
    assert sum(line.startswith("stage  samples") for line in said) == 1


def test_an_evaluation_counts_as_better_only_above_the_best_or_below_it():
    state = TrainingState()
    state.begin(0)
    steps = enumerate([1.0, 0.9, 2.0, 0.5, float("nan")], start=1)
    assert [state.evaluated(score, step, 1.0, greater_is_better=True) for step, score in steps] == [
        True, False, True, False, False
    ]  # fmt: skip
    assert (state.best[0], state.evaluations_since_best) == (Best(2.0, 3, 1.0), 2)
    assert state.evaluated(1.5, 6, 9.0, greater_is_better=False)
    assert state.evaluations_since_best == 0
    assert np.isclose(state.best[0].score, 1.5)


def test_of_equal_scores_the_lower_cross_entropy_is_better_and_of_equal_ones_in_both_the_later():
    for greater_is_better in (True, False):
        state = TrainingState()
        state.begin(0)
        seen = []
        for step, cross_entropy in enumerate([3.0, 2.0, 2.5, 2.0, 2.0], start=1):
            better = state.evaluated(0.0, step, cross_entropy, greater_is_better=greater_is_better)
            seen.append((better, state.best[0].step, state.evaluations_since_best))
        # steps 4 and 5 are later and no better: their weights are kept, and patience goes on counting
        assert seen == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (True, 4, 2), (True, 5, 3)]
        assert not state.evaluated(0.0, 6, float("nan"), greater_is_better=greater_is_better)


@pytest.mark.parametrize("greater_is_better", [True, False])
@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([(0, math.nan), (0, 2), (0, 1)], 3),
        ([(0, math.nan), (0, 1), (0, 2)], 2),
        ([(0, 2), (0, math.nan)], 1),
        ([(math.nan, 1), (0, 9)], 2),
        ([(math.nan, math.nan), (math.nan, 1)], 2),
        ([(0, math.inf), (0, math.nan)], 2),  # equally bad: the later
    ],
)
def test_nan_is_the_worst_evaluation(evaluations, best, greater_is_better):
    state = TrainingState()
    state.begin(0)
    for step, (score, cross_entropy) in enumerate(evaluations, start=1):
        state.evaluated(score, step, cross_entropy, greater_is_better=greater_is_better)
    assert state.best[0].step == best


def test_without_a_teacher_nothing_is_said_of_one(schedule):
    of_teacher = ("divergence", "agreement", "temperature", "alpha")
    logs = {name: value for name, value in LOGS.items() if name not in of_teacher} | {"accuracy": 0.254}
    said = "here | loss 2.274 | accuracy 25 % | 1,234 tokens/s, 321 of them supervised | 1.25 GiB"
    assert lines.training_line("here", logs) == said
    begins = lines.stage_begins_line(schedule, 1, weights="the student as it was given", distils=False)
    assert begins == "stage 2/2 begins: 8 samples, 4 steps, from the student as it was given"
    state = TrainingState(stage=1, losses={0: 2.5, 1: 2.0})
    header, *rows = lines.training_table(schedule, state, distils=False).splitlines()
    assert header.split() == ["stage", "samples", "steps", "loss", "best", "dev", "at", "step", "time"]
    assert [row.split() for row in rows] == [
        ["1", "4", "2", "2.500", "-", "-", "0:00"],
        ["2", "8", "4", "2.000", "-", "-", "0:00"],
    ]
    assert "KD" not in lines.legend(None)
    assert "cross-entropy" in lines.legend(None)
