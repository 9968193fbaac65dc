"""Trainings beside a curriculum: their steps, what they measure, and going on after a stop."""

from __future__ import annotations

import math

import pytest
from tiny_training import before_each_batch, curriculum_of, same_bits, train, trainer_of, weights_of

from pocl_fast.curriculum.competence import Competence
from pocl_fast.system.errors import InputError
from pocl_fast.training.setup import learning_rate_factor

PACES = [
    {"kind": "none"},
    {"kind": "random", "stage_length": "equal"},
    {"kind": "reverse"},
    {"kind": "length"},
    {"kind": "pocl", "pacing": "competence"},
]
UNMEASURED = [pace for pace in PACES if pace["kind"] not in ("pocl", "reverse")]
MANY = {"count": 24, "stages": 3, "epochs_per_stage": 1, "eval_strategy": "no"}


@pytest.mark.parametrize("pace", UNMEASURED, ids=str)
def test_a_control_without_measured_difficulty_measures_nothing(tmp_path, capsys, pace):
    trainer = trainer_of(tmp_path, **MANY, **pace)
    schedule = trainer.planned()
    assert schedule.total_steps == 2 + 4 + 6
    assert not (tmp_path / "difficulty.parquet").exists()
    assert f"curriculum {pace['kind']}: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["none", "random", "length"])
def test_a_curriculum_in_another_order_than_its_name_says_is_refused(tmp_path, kind):
    with pytest.raises(InputError, match=f"curriculum='{kind}' makes . stages over an order of its own"):
        trainer_of(tmp_path, curriculum=curriculum_of(24, stages=2), **MANY, kind=kind).planned()
    own = trainer_of(tmp_path, **MANY, kind=kind).planned().curriculum
    assert trainer_of(tmp_path, curriculum=own, **MANY, kind=kind).planned().total_steps == 12


def test_a_random_order_of_another_seed_is_refused_by_that_seed(tmp_path):
    other = trainer_of(tmp_path, **MANY, kind="random", seed=4).planned().curriculum
    with pytest.raises(InputError, match=r"an order of its own \(shuffled by seed 5\), and another curriculum"):
        trainer_of(tmp_path, curriculum=other, **MANY, kind="random", seed=5).planned()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("pace", PACES, ids=str)
def test_the_cosine_is_one_over_all_stages_or_anew_in_each(tmp_path, pace, fresh):
    given = None if pace["kind"] in ("none", "random", "length") else curriculum_of(24, stages=3)
    trainer = trainer_of(tmp_path, curriculum=given, **MANY, **pace, fresh_learning_rate=fresh)
    schedule = trainer.planned()
    factor = learning_rate_factor(trainer.args, schedule)
    for step in range(12):
        place = schedule.place(step)
        done = place.step_in_stage / place.stage_steps if fresh else step / 12
        assert factor(step) == pytest.approx((1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize("pace", PACES, ids=str)
def test_a_control_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch, pace):
    options = {**MANY, **pace, "fresh_learning_rate": False, "fresh_optimizer": False, "save_minutes": 1e-9}
    if pace["kind"] in ("pocl", "reverse"):
        options["curriculum"] = curriculum_of(24, stages=3)
    whole = weights_of(train(tmp_path / "whole", **options))
    seen = []

    def stop(number, trainer, samples):
        seen.append([sample.index for sample in samples])
        if number == 7:
            raise KeyboardInterrupt

    before_each_batch(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", **options)
    cut = seen.copy()
    assert same_bits(weights_of(train(tmp_path / "cut", **options)), whole)
    assert seen[7] == cut[6]  # the step that was not done
    assert len(seen) == 7 + 6


def test_stages_begin_from_the_best_weights_under_one_cosine(tmp_path, capsys):
    curriculum = curriculum_of(8, stages=2)
    options = {"fresh_learning_rate": False, "fresh_optimizer": False, "stage_weights": "best", "pacing": "competence"}
    trainer = trainer_of(tmp_path, curriculum=curriculum, epochs_per_stage=2, **options)
    trainer.train()
    said = capsys.readouterr().out
    assert "from the best weights of stage 1" in said
    assert trainer.state.global_step == trainer.planned().total_steps == 6


def test_a_control_by_tokens_says_that_its_steps_are_counted_over_the_file(tmp_path, capsys):
    trainer_of(tmp_path, **MANY, kind="random", tokens_per_batch=60).planned()
    assert "counted over the samples in file order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "random", "remeasure": True}, "'random' does not measure it"),
        ({"kind": "none", "remeasure": True}, "'none' does not measure it"),
        ({"pacing": "competence", "remeasure": True}, "of each baby step"),
    ],
)
def test_options_that_contradict_a_control_are_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, count=8, **given)


def test_a_curriculum_of_none_has_no_pacing(tmp_path):
    plans = [
        trainer_of(tmp_path / pacing, **MANY, kind="none", pacing=pacing).planned() for pacing in ("auto", "competence")
    ]
    plain = trainer_of(tmp_path / "plain", **MANY, kind="none").planned()
    for plan in plans:
        assert plan.total_steps == plain.total_steps
        assert all(plan.batch(step, 0) == plain.batch(step, 0) for step in range(plan.total_steps))


def test_auto_pacing_is_competence_but_along_a_given_curriculum_or_where_difficulty_is_measured_again(tmp_path):
    own = trainer_of(tmp_path / "own", **MANY, kind="random", pacing="auto").planned()
    given = trainer_of(tmp_path / "given", curriculum=curriculum_of(8, stages=2), pacing="auto").planned()
    again = trainer_of(tmp_path / "again", count=8, pacing="auto", remeasure=True).planned()
    assert own.competence == Competence(initial=0.4, full=0.3)
    assert given.competence is None
    assert again.competence is None
