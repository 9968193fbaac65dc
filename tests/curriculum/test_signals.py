"""The option `--signals`: which scores samples are ranked by, and what is said about wrong ones."""

import sys

import numpy as np
import pytest

from pocl_fast.curriculum.signals import chosen_signals, columns_read, teacher_columns
from pocl_fast.system.errors import InputError

COLUMNS = {
    "index": np.array([0, 1, 3]),
    "rouge_l": np.array([0.5, 0.0, 1.0]),
    "cross_entropy": np.array([2.0, 3.0, 1.5]),
    "answer_length": np.array([5, 9, 1]),
    "teacher_cross_entropy": np.array([1.0, 3.5, 1.25]),
    "mean_kl": np.array([0.25, 4.0, 0.0]),
    "answer": np.array(["yes", "", "no idea"], dtype=object),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's into the working folder; its name."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "users_signals.py").write_text(text)
        sys.modules.pop("users_signals", None)
        return "users_signals"

    yield write
    sys.modules.pop("users_signals", None)


@pytest.mark.parametrize(
    ("name", "scores", "easy"),
    [
        ("rouge_l", [0.5, 0.0, 1.0], "high"),
        ("cross_entropy", [2.0, 3.0, 1.5], "low"),
        ("answer_length", [5.0, 9.0, 1.0], "low"),
        ("teacher_cross_entropy", [1.0, 3.5, 1.25], "low"),
        ("cross_entropy_gap", [1.0, -0.5, 0.25], "low"),
        ("mean_kl", [0.25, 4.0, 0.0], "low"),
    ],
)
def test_built_in_signals_have_their_scores_and_directions(name, scores, easy):
    (chosen,) = chosen_signals(name)
    assert chosen.signal.scores(COLUMNS).tolist() == scores
    assert chosen.signal.scores(COLUMNS).dtype == np.float64
    assert chosen.signal.easy == easy


def test_the_default_is_the_paper_s():
    from pocl_fast.options.answers import DifficultyOptions

    chosen = chosen_signals(DifficultyOptions().signals)
    assert [(one.signal.name, one.weight) for one in chosen] == [("rouge_l", 1.0), ("cross_entropy", 1.0)]


def test_names_may_have_weights_and_spaces():
    chosen = chosen_signals(" mean_kl = 2, rouge_l,cross_entropy=0.5")
    names = [("mean_kl", 2.0), ("rouge_l", 1.0), ("cross_entropy", 0.5)]
    assert [(one.signal.name, one.weight) for one in chosen] == names


def test_what_is_read_is_what_the_signals_read_once():
    assert columns_read(chosen_signals("cross_entropy_gap,cross_entropy")) == (
        "cross_entropy",
        "teacher_cross_entropy",
    )
    assert teacher_columns("rouge_l,cross_entropy,answer_length") == ()
    assert teacher_columns("mean_kl,cross_entropy_gap") == ("teacher_cross_entropy", "mean_kl")


def test_a_function_of_one_s_own_takes_a_sample_s_record(module):
    name = module(
        "def words(record):\n    assert type(record['index']) is int\n    return len(record['answer'].split())"
    )
    (chosen,) = chosen_signals(f"{name}:words=3")
    assert chosen.signal.scores(COLUMNS).tolist() == [1.0, 0.0, 2.0]
    assert (chosen.signal.easy, chosen.signal.columns, chosen.weight) == ("low", None, 3.0)
    assert columns_read([chosen]) is None


def test_a_function_may_say_its_direction_and_its_columns(module):
    text = "def twice(record):\n    assert set(record) == {'index', 'mean_kl'}\n    return 2 * record['mean_kl']\n"
    name = module(text + "twice.easy = 'high'\ntwice.columns = ('mean_kl',)\n")
    (chosen,) = chosen_signals(f"{name}:twice")
    assert chosen.signal.scores(COLUMNS).tolist() == [0.5, 8.0, 0.0]
    assert chosen.signal.easy == "high"
    assert teacher_columns(f"{name}:twice") == ("mean_kl",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rouge", r"no signal named 'rouge'; there are rouge_l, cross_entropy, .* named package.module:function"),
        ("", "no signal named ''"),
        ("rouge_l,,mean_kl", "no signal named ''"),
        ("rouge_l,mean_kl,rouge_l", "names rouge_l twice"),
        ("rouge_l=much", "rouge_l=much: a weight must be a positive number, got 'much'"),
        ("rouge_l=0", "a weight must be a positive number, got '0'"),
        ("rouge_l=inf", "a weight must be a positive number"),
        ("rouge_l=", "a weight must be a positive number, got ''"),
        ("no_such_package.at_all:score", "cannot import no_such_package.at_all"),
        ("json:no_such", "json has no function 'no_such'"),
        ("math:pi", "must be a function, is a float"),
    ],
)
def test_wrong_signals_are_named(given, message):
    with pytest.raises(InputError, match=message):
        chosen_signals(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(record): return record['nothing']", "users_signals:f: sample 0: KeyError: 'nothing'"),
        ("def f(record): return record['answer']", "sample 0: the function must give a number, got 'yes'"),
        ("def f(record): return None if record['index'] == 3 else 1", "sample 3: .* a number, got None"),
        ("def f(record): return 1\nf.easy = 'yes'", '`easy` must be "high" or "low", got \'yes\''),
        ("def f(record): return 1\nf.columns = 'answer'", "`columns` must list names, got 'answer'"),
        ("1 / 0", "importing users_signals failed: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_function_of_one_s_own_is_said(module, text, message):
    name = module(text)
    with pytest.raises(InputError, match=message):
        chosen_signals(f"{name}:f")[0].signal.scores(COLUMNS)
