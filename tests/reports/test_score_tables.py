"""The tables of scores, and the answers that changed most, out of files written by hand."""

import json

import numpy as np
import pytest

from pocl_fast.answers.sample_scores import Asked, SampleScores, write_scores
from pocl_fast.reports.score_tables import changed_answers, score_tables, text_lines

SCORES = {
    "seeds": [1, 2], "rouge_l": 12.345, "rouge_l_spread": 0.5, "rouge_l_interval": [10.0, 14.567],
    "exact_match": 3.21, "exact_match_interval": [0.0, 6.0], "cross_entropy": 1.5,
    "cross_entropy_interval": [1.25, 2.0], "perplexity": 4.4817, "mean_kl": None, "samples": 7,
}  # fmt: skip


def evaluated(folder, scores, role="dev", chooses=True, name="dev"):
    one = {"role": role, "chooses_weights": chooses, "source": "f", "samples": 1234, "fingerprint": "x"}
    (folder / "evaluation.json").write_text(json.dumps({"sets": {name: one | {"scores": scores}}}))


def test_scores_have_their_spread_and_intervals_and_a_dash_where_there_are_none(tmp_path):
    evaluated(tmp_path, {"before": SCORES, "teacher": SCORES | {"exact_match": 100.0}})
    [table] = score_tables(tmp_path)
    assert table.columns == ("before", "after", "teacher")
    assert [(row.name.strip(), *row.cells) for row in table.rows] == [
        ("ROUGE-L, 0 to 100", "12.35 ± 0.50", "-", "12.35 ± 0.50"),
        ("95 % interval", "10.00 to 14.57", "-", "10.00 to 14.57"),
        ("exact match, %", "3.2", "-", "100.0"),
        ("95 % interval", "0.0 to 6.0", "-", "0.0 to 6.0"),
        ("cross-entropy, nats a token", "1.500", "-", "1.500"),
        ("95 % interval", "1.250 to 2.000", "-", "1.250 to 2.000"),
        ("perplexity", "4.48", "-", "4.48"),
    ]
    evaluated(tmp_path, {"before": SCORES | {"mean_kl": 0.1234}})
    [table] = score_tables(tmp_path)
    assert (table.rows[-1].name, table.rows[-1].cells) == ("KL(teacher || student)", ("0.123", "-"))


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ({"scores": {"before": SCORES, "after": SCORES}}, "dev set, 1,234 samples: scores that chose the weights"),
        ({"scores": {"before": SCORES}}, "dev set, 1,234 samples: scores that choose the weights"),
        ({"scores": {"before": SCORES}, "chooses": False, "name": "b"}, "dev set b, 1,234 samples: chose nothing"),
        (
            {"scores": {"after": SCORES}, "chooses": False, "role": "test", "name": "news"},
            "test set news, 1,234 samples: chose nothing",
        ),
    ],
)
def test_scores_are_called_what_they_are(tmp_path, given, title):
    evaluated(tmp_path, **given)
    assert [table.title for table in score_tables(tmp_path)] == [title]
    assert text_lines(tmp_path)[0] == title


def test_one_seed_has_no_spread_and_one_sample_no_interval_and_both_are_said(tmp_path):
    alone = SCORES | {name: None for name in SCORES if name.endswith("interval")} | {"seeds": [1]}
    evaluated(tmp_path, {"before": alone})
    [table] = score_tables(tmp_path)
    assert table.rows[0].cells == ("12.35", "-")
    assert [row.name for row in table.rows if "interval" in row.name] == []
    assert table.note == "one seed: no spread over seeds, one sample: no interval"
    evaluated(tmp_path, {"before": SCORES})
    note = "2 answers a sample; ± is the spread over the seeds, intervals are over samples"
    assert score_tables(tmp_path)[0].note == note


def test_lines_for_a_terminal_fit_into_80_columns(tmp_path):
    evaluated(tmp_path, {"before": SCORES, "after": SCORES, "teacher": SCORES})
    assert all(len(line) <= 80 for line in text_lines(tmp_path))


def write(folder, when, rouge, lines=None):
    rouge = np.array(rouge, dtype=float)
    count, seeds = rouge.shape
    scores = SampleScores(
        tuple(range(seeds)), [[f"{when} {i} seed {s}" for s in range(seeds)] for i in range(count)], rouge,
        np.zeros((count, seeds), bool), np.ones(count), np.ones(count, int),
    )  # fmt: skip
    asked = [Asked(line, f"prompt {line}", ("reference", "other")) for line in lines or range(1, count + 1)]
    write_scores(folder / "scores" / f"dev-{when}.parquet", asked, scores)


def test_the_answers_that_changed_most_are_by_the_mean_over_seeds(tmp_path):
    evaluated(tmp_path, {"before": SCORES, "after": SCORES})
    write(tmp_path, "before", [[0, 0], [50, 50], [10, 30], [0, 90], [5, 5], [6, 6], [7, 7]])
    assert changed_answers(tmp_path) == []
    write(tmp_path, "after", [[80, 0], [50, 50], [0, 0], [45, 45], [7, 5], [9, 9], [11, 11]])
    [changed] = changed_answers(tmp_path)
    assert [(row.change, row.prompt) for row in changed.improved] == [
        ("+40.0", "prompt 1"), ("+4.0", "prompt 7"), ("+3.0", "prompt 6"), ("+1.0", "prompt 5"),
    ]  # fmt: skip
    [worse] = changed.worsened
    assert (worse.change, worse.prompt, worse.reference) == ("-20.0", "prompt 3", "reference")
    assert (worse.before, worse.after) == ("before 2 seed 0", "after 2 seed 0")


def test_answers_to_other_samples_are_not_compared(tmp_path):
    evaluated(tmp_path, {"before": SCORES, "after": SCORES})
    write(tmp_path, "before", [[0], [1]], lines=[1, 2])
    write(tmp_path, "after", [[0], [1]], lines=[1, 3])
    assert changed_answers(tmp_path) == []
