"""What a person sees while a step runs: progress bars on a terminal and in a log file, and a step's time and memory."""

import io
import re
import sys
import time

import pytest
import tqdm.std

from pocl_fast.system.console import duration, measured, minutes, progress_bar, say, shared_progress, speed, waiting


@pytest.fixture
def clock(monkeypatch):
    """tqdm's time in seconds, which stands still but where a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


ON_BOTH = pytest.mark.parametrize("kind", [io.StringIO, Terminal], ids=["log file", "terminal"])


def stderr_of(kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := kind())
    return stream


def states(stream):
    """What was shown of a bar, in turn, without the bar itself."""
    shown = [state.strip() for state in re.split(r"[\r\n]", stream.getvalue())]
    return [re.sub(r"train: +\d+%\|.*\| (\d+)/(\d+)", r"train: \1 of \2", state) for state in shown if state]


@ON_BOTH
def test_what_is_not_known_is_not_shown_and_the_rest_in_words(monkeypatch, clock, kind):
    stderr = stderr_of(kind, monkeypatch)
    with progress_bar(100, "train", "steps") as bar:
        for _ in range(3):
            clock[0] += 36
            bar.update(10)
        bar.set_postfix_str("loss 1.500", refresh=False)
    assert states(stderr) == [
        "train: 0 of 100 steps",
        "train: 10 of 100 steps, 3.6 s/step, 0:36 elapsed, 5:24 left",
        "train: 20 of 100 steps, 3.6 s/step, 1:12 elapsed, 4:48 left",
        "train: 30 of 100 steps, 3.6 s/step, 1:48 elapsed, 4:12 left",
        "train: 30 of 100 steps, 3.6 s/step, 1:48 elapsed, 4:12 left, loss 1.500",
    ]


def test_a_log_file_has_whole_lines_and_no_control_characters(monkeypatch, clock):
    stderr = stderr_of(io.StringIO, monkeypatch)
    with progress_bar(2, "train", "steps") as bar:
        clock[0] += 20
        bar.update(2)
    assert stderr.getvalue() == "train: 0 of 2 steps\ntrain: 2 of 2 steps, 10 s/step, 0:20 elapsed\n"


def test_a_log_files_last_line_is_there_once_also_where_time_has_passed_since(monkeypatch, clock):
    stderr = stderr_of(io.StringIO, monkeypatch)
    with progress_bar(2, "train", "steps") as bar:
        clock[0] += 20
        bar.update(2)
        clock[0] += 7
    assert len(stderr.getvalue().splitlines()) == 2
    with progress_bar(2, "train", "steps") as bar:
        clock[0] += 20
        bar.update(1)
        clock[0] += 1
        bar.update(1)  # too soon for a line of its own: closing writes it
    assert stderr.getvalue().splitlines()[-1].startswith("train: 2 of 2 steps")


def waited_for(stream, lines):
    """What is in a stream as soon as it has so many lines, or after 10 s."""
    end = time.monotonic() + 10
    while len(states(stream)) < lines and time.monotonic() < end:
        time.sleep(0.01)
    return states(stream)


def test_a_bar_shows_that_time_passes_while_no_unit_is_done(monkeypatch, clock):
    stderr = stderr_of(io.StringIO, monkeypatch)
    monkeypatch.setattr("pocl_fast.system.console._in_a_log", [0.05])
    with progress_bar(4, "train", "steps") as bar:
        clock[0] += 5
        assert waited_for(stderr, 3)[1:3] == ["train: 0 of 4 steps, 0:05 elapsed"] * 2
        bar.update(1)
        assert waited_for(stderr, 5)[-1].startswith("train: 1 of 4 steps, 5.0 s/step, 0:05 elapsed")
    count = len(states(stderr))
    time.sleep(0.2)
    assert len(states(stderr)) == count  # closed


def test_a_bar_that_is_to_be_shown_late_is_not_shown_before(monkeypatch, clock):
    stderr = stderr_of(io.StringIO, monkeypatch)
    monkeypatch.setattr("pocl_fast.system.console._in_a_log", [0.02])
    with progress_bar(4, "train", "steps", delay=3):
        time.sleep(0.2)
        assert states(stderr) == []
        clock[0] += 4
        assert waited_for(stderr, 1)[0] == "train: 0 of 4 steps, 0:04 elapsed"


@ON_BOTH
def test_waiting_is_shown_where_it_takes_longer_and_leaves_no_line_where_it_does_not(monkeypatch, clock, kind):
    stderr = stderr_of(kind, monkeypatch)
    monkeypatch.setattr("pocl_fast.system.console._in_a_log", [0.02])
    with waiting("loading the teacher", "models"):
        clock[0] += 2
    assert states(stderr) == []
    with waiting("loading the teacher", "models"):
        clock[0] += 4
        shown = waited_for(stderr, 1)[0]
        assert shown.startswith("loading the teacher: ")
        assert shown.endswith(" models, 0:04 elapsed")
    assert "4.0 s/model" in states(stderr)[-1]


@ON_BOTH
def test_what_an_earlier_process_did_does_not_count_as_speed(monkeypatch, clock, kind):
    stderr = stderr_of(kind, monkeypatch)
    with progress_bar(100, "train", "steps", done=90) as bar:
        clock[0] += 36
        bar.update(2)
    assert states(stderr)[0] == "train: 90 of 100 steps"
    assert states(stderr)[1] == "train: 92 of 100 steps, 18 s/step, 0:36 elapsed, 2:24 left"


@ON_BOTH
def test_an_estimate_of_what_all_ranks_did_never_passes_the_total(monkeypatch, clock, kind):
    stderr = stderr_of(kind, monkeypatch)
    with shared_progress(10, "train", "samples") as report:
        for _ in range(3):
            clock[0] += 20
            report(4)
    assert states(stderr)[-1] == "train: 10 of 10 samples, 6.0 s/sample, 1:00 elapsed"


@ON_BOTH
def test_nothing_to_do_is_no_error(monkeypatch, kind):
    stderr = stderr_of(kind, monkeypatch)
    with shared_progress(0, "train", "samples") as report:
        report(0)
    assert states(stderr)[-1] == "train: 0 of 0 samples"


@ON_BOTH
def test_a_line_is_printed_once_beside_a_bar(monkeypatch, capsys, kind):
    stderr_of(kind, monkeypatch)
    with progress_bar(2, "train", "steps"):
        say("stage 1 begins")
    assert capsys.readouterr().out == "stage 1 begins\n"


# at and below one a second; the last below ten, which alone has a decimal; thousands
@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (1.0, "1.0 steps/s"),
        (0.8, "1.2 s/step"),
        (9.94, "9.9 steps/s"),
        (0.05, "20 s/step"),
        (12345.6, "12,346 steps/s"),
    ],
)
def test_speed_is_units_a_second_or_seconds_a_unit(rate, shown):
    assert speed(rate, "steps") == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")])
def test_a_duration_has_hours_where_it_needs_them(seconds, shown):
    assert minutes(seconds) == shown


# at and past each border of the units; what rounds to a minute is one
@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (750, "12 min 30 s"),
        (3599.6, "1 h 0 min"),
        (3723, "1 h 2 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_a_duration_in_words_has_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def test_a_step_is_timed_and_its_peak_of_memory_seen():
    with measured() as before:
        pass
    with measured() as usage:
        block = bytearray(b"1") * (256 << 20)
        time.sleep(0.4)  # sampled ten times a second
        del block
    assert usage.peak_bytes >= before.peak_bytes + (200 << 20)
    assert 0.4 <= usage.seconds < 60
