"""How long a step of some tokens takes, by two that were timed."""

import pytest

from pocl_fast.plan.timing import step_seconds


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
