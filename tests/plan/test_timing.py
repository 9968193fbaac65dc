"""How long steps and evaluations take, by parts that were timed."""

from types import SimpleNamespace

import pytest
from tiny import tiny_model
from tiny_training import encoded_samples

from pocl_fast.answers.likelihood import KEPT_BYTES
from pocl_fast.plan.memory import states_bytes
from pocl_fast.plan.timing import final_evaluations, seconds_again, step_seconds


@pytest.mark.parametrize(
    ("tokens", "sizes", "seconds", "expected"),
    [
        (150, (100, 200), (1.0, 3.0), 2.0),  # between them on a line
        (100, (100, 200), (1.0, 3.0), 1.0),
        (200, (100, 200), (1.0, 3.0), 3.0),
        (50, (100, 200), (1.0, 3.0), 0.5),  # beyond them in proportion
        (400, (100, 200), (1.0, 3.0), 6.0),
        (100, (100, 100), (1.0, 1.2), 1.0),
        (4550, (6401, 6509), (20.0, 23.0), 20.0 * 4550 / 6401),  # a line through these two is at -31 s there
        (4550, (6401, 6509), (23.0, 20.0), 23.0 * 4550 / 6401),
    ],
)
def test_a_step_takes_time_on_a_line_between_two_others_and_in_proportion_beyond(tokens, sizes, seconds, expected):
    assert step_seconds(tokens, sizes, seconds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("needed", "expected"), [(0, 1.0), (KEPT_BYTES, 1.0), (2 * KEPT_BYTES, 3.0), (4 * KEPT_BYTES, 4.0)]
)
def test_a_later_evaluation_runs_the_teacher_where_there_was_no_room_for_its_states(needed, expected):
    assert seconds_again(5.0, 1.0, needed) == pytest.approx(expected)


def test_states_are_those_of_the_supervised_tokens_of_all_sets():
    _, encoded = encoded_samples(5)
    tokens = sum(len(one.response_ids) for one in encoded)
    assert states_bytes([encoded[:2], encoded[2:]], tiny_model(hidden=48)) == 4 * 48 * tokens


def answering(seconds):
    return SimpleNamespace(seconds=seconds, timed="a batch")


def test_the_teacher_is_run_in_the_first_evaluation_and_its_states_are_read_in_others():
    _, encoded = encoded_samples(6)
    sets, tokens = [encoded[:2], encoded[2:]], sum(map(len, encoded))
    students, teachers = [answering(2.0), answering(3.0)], [answering(10.0), answering(20.0)]
    before, after = final_evaluations(sets, students, teachers, 0.5, first=2.0, again=0.75, seeds=4)
    assert [one.step for one in before] == ["evaluate before", "evaluate the teacher"]
    assert [one.step for one in after] == ["evaluate after"]
    assert before[0].seconds == pytest.approx(4 * 5 + 2.0 * tokens)
    assert before[1].seconds == pytest.approx(4 * 30 + 0.25 * tokens)
    assert after[0].seconds == pytest.approx(4 * 5 + 0.75 * tokens)


def test_without_a_teacher_every_evaluation_scores_the_student_alone():
    _, encoded = encoded_samples(3)
    [before], [after] = final_evaluations([encoded], [answering(2.0)], [], 0.5, first=0.5, again=0.5, seeds=1)
    assert before.seconds == after.seconds == pytest.approx(2 + 0.5 * sum(map(len, encoded)))
