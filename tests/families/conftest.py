"""What the cells of the matrix give, as a table at the end of a run; and a limit to the time of each."""

from __future__ import annotations

import contextlib
import gc
import signal
from pathlib import Path

import pytest

from families.page import Outcome, counts, page, table, wrong_cells

PROPERTY = "family cell"  # of a test: row, column, what came out, what was said


def pytest_addoption(parser):
    parser.addoption("--families-page", type=Path, help="where to write the table of all families, as docs/families.md")


@pytest.fixture
def outcome(record_property):
    """Notes how a family was run in a cell, and what was said of it."""

    def note(row, column, result, said=""):
        record_property(PROPERTY, (row, column, result, said))

    return note


@pytest.fixture
def little_to_collect():
    """Takes what is in memory out of garbage collection: transformers' trainer collects twice, half a second each."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture
def time_limit():
    """A context that raises TimeoutError after some seconds."""

    def late(number, frame):
        raise TimeoutError("the time of a cell is over")

    @contextlib.contextmanager
    def limit(seconds):
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return limit


def results_of(reports):
    """The outcome of each cell by row and column, out of the reports of a run's tests."""
    results: dict[str, dict[str, Outcome]] = {}
    for report in reports:
        if report.when != "call" or ("::test_family[" not in report.nodeid and not report.user_properties):
            continue
        noted = dict(report.user_properties).get(PROPERTY)
        if noted is not None:
            row, column, result, said = noted
            results.setdefault(row, {})[column] = Outcome(result, said)
        else:
            row, column = report.nodeid.split("[", 1)[1][:-1].rsplit("-", 1)
            results.setdefault(row, {})[column] = Outcome("WRONG", _raised(report))
    return results


def _raised(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())


def pytest_terminal_summary(terminalreporter, config):
    stats = terminalreporter.stats
    ours = [report for kind in ("passed", "failed") for report in stats.get(kind, ()) if "families" in report.nodeid]
    results = results_of(ours)
    if not results:
        return
    terminalreporter.section("families")
    terminalreporter.write_line(table(results))
    terminalreporter.write_line(wrong_cells(results))
    terminalreporter.write_line(counts(results))
    if path := config.getoption("families_page"):
        import transformers

        path.write_text(page(results, transformers.__version__), encoding="utf-8")
        terminalreporter.write_line(f"written: {path}")
