"""The evaluate steps: the scores on each set, what they are called, and that ranks make those of one process."""

import json

import numpy as np
import pytest
from ranks import gloo
from tiny import arithmetic, save_tiny, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, read_json, refusal, run, score_rows, scores_of, select, weights

from pocl_fast.answers import evaluation
from pocl_fast.answers.likelihood import KeptStates
from pocl_fast.system import ranks

BRIEF = {"stages": 1, "eval_seeds": 10, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), train=12, dev=4)
    write_jsonl(folder / "news.jsonl", arithmetic(3, start=200))
    write_jsonl(folder / "others.jsonl", arithmetic(2, start=300))
    return folder


def with_sets(inputs, **changed):
    sets = (f"main={inputs / 'dev.jsonl'}", f"more={inputs / 'others.jsonl'}")
    return options(inputs, **(BRIEF | {"dev": sets, "test": f"news={inputs / 'news.jsonl'}"} | changed))


@pytest.fixture(scope="module")
def several(inputs):
    """A distilled run with two dev sets and a test set."""
    assert run("distill", inputs / "several", *with_sets(inputs)) == 0
    return inputs / "several"


def test_evaluation_holds_the_scores_before_and_after_and_training_lowered_the_loss(finished):
    _, output = finished
    results = scores_of(output)
    assert sorted(results) == ["after", "before", "teacher"]
    for scores in results.values():
        assert (scores["seeds"], scores["samples"]) == ([10, 20], 8)
        low, high = scores["cross_entropy_interval"]
        assert low < scores["cross_entropy"] < high
        assert scores["perplexity"] == pytest.approx(np.exp(scores["cross_entropy"]))
    assert results["after"]["cross_entropy"] < results["before"]["cross_entropy"] - 0.02
    assert results["after"]["mean_kl"] < results["before"]["mean_kl"] - 0.02
    assert results["teacher"]["mean_kl"] is None
    rows = score_rows(output, "after")
    assert [row["line"] for row in rows] == list(range(1, 9))
    assert rows[0]["references"] == ["100"]
    assert all(len(row["answers"]) == len(row["rouge_l"]) == len(row["exact_match"]) == 2 for row in rows)
    assert np.mean([row["rouge_l"] for row in rows]) == pytest.approx(results["after"]["rouge_l"])
    nats = sum(row["mean_kl"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert nats == pytest.approx(results["after"]["mean_kl"])


def test_each_set_has_its_role_and_its_scores_and_the_first_alone_chose(several, inputs):
    sets = read_json(several / "evaluation.json")["sets"]
    known = {name: (one["role"], one["chooses_weights"], one["samples"]) for name, one in sets.items()}
    assert known == {"main": ("dev", True, 4), "more": ("dev", False, 2), "news": ("test", False, 3)}
    assert sets["news"]["source"] == str(inputs / "news.jsonl")
    assert len({one["fingerprint"] for one in sets.values()}) == 3
    assert all(sorted(one["scores"]) == ["after", "before", "teacher"] for one in sets.values())
    files = {f"{name}-{when}.parquet" for name in sets for when in ("before", "after", "teacher")}
    assert {path.name for path in (several / "scores").iterdir()} == files


def test_other_sets_change_nothing_of_the_student(several, inputs, tmp_path):
    assert run("distill", tmp_path / "alone", *with_sets(inputs, dev=inputs / "dev.jsonl", test=None)) == 0
    assert weights(tmp_path / "alone") == weights(several)
    assert scores_of(tmp_path / "alone")["after"] == scores_of(several, "main")["after"]


def test_what_evaluations_keep_of_the_teacher_is_used_and_changes_no_score(several, inputs, tmp_path, monkeypatch):
    reads = []
    read = KeptStates.read
    monkeypatch.setattr(KeptStates, "read", lambda kept, samples: reads.append(len(samples)) or read(kept, samples))
    assert run("distill", tmp_path / "keeps", *with_sets(inputs)) == 0
    assert sum(reads) == 2 * (4 + 2 + 3)  # evaluate-teacher and evaluate-after
    monkeypatch.setattr("pocl_fast.answers.likelihood.KEPT_BYTES", 0)
    assert run("distill", tmp_path / "keeps-none", *with_sets(inputs)) == 0
    assert sum(reads) == 2 * (4 + 2 + 3)
    for output in (several, tmp_path / "keeps"):
        assert read_json(output / "evaluation.json") == read_json(tmp_path / "keeps-none" / "evaluation.json")


def test_a_test_that_is_the_dev_file_is_said_to_be_none_and_so_are_samples_that_are_trained_on(
    inputs, tmp_path, capsys
):
    copy = write_jsonl(tmp_path / "copy.jsonl", arithmetic(4, start=100))
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*arithmetic(2), *arithmetic(2, start=400)])
    output, words = tmp_path / "out", with_sets(inputs, test=(f"copy={copy}", f"mixed={mixed}"))
    assert run("distill", output, *words) == 0
    said = capsys.readouterr().out
    assert said.count("test set copy: 4 of 4 samples are in the dev set main too, by whose scores the weights") == 1
    assert said.count("test set mixed: 2 of 4 samples are among the training samples too: the student is trained") == 1
    assert "so this is no test: take them out of the training samples" in said
    sets = read_json(output / "evaluation.json")["sets"]
    assert {name: one["chooses_weights"] for name, one in sets.items()} == {
        "main": True, "more": False, "copy": True, "mixed": False,
    }  # fmt: skip


def test_a_set_that_is_added_later_is_not_called_the_one_that_chose(several, inputs, tmp_path, capsys):
    import shutil

    output = shutil.copytree(several, tmp_path / "copy")
    words = ["--dev", f"news={inputs / 'news.jsonl'}", "--test", f"was={inputs / 'dev.jsonl'}"]
    said = refusal(capsys, "evaluate", output, *words)
    assert "'evaluate-before' was made with other input (sets: was ['--dev main', '--dev more', '--test news']" in said
    assert run("evaluate", output, *words, "--restart") == 0
    sets = read_json(output / "evaluation.json")["sets"]
    assert {name: (one["role"], one["chooses_weights"]) for name, one in sets.items()} == {
        "news": ("dev", False), "was": ("test", True),
    }  # fmt: skip
    assert sets["was"]["scores"]["after"] == scores_of(several, "main")["after"]
    assert {path.name.split("-")[0] for path in (output / "scores").iterdir()} == {"news", "was"}


def test_an_interrupted_evaluation_goes_on_with_the_sets_that_are_left(several, inputs, tmp_path, monkeypatch):
    output, scored, evaluate = tmp_path / "out", [], evaluation.evaluate

    def stopped(model, data, *given, name, **how):
        if name == "evaluate-before more" and len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(name)
        return evaluate(model, data, *given, name=name, **how)

    monkeypatch.setattr(evaluation, "evaluate", stopped)
    words = select(with_sets(inputs), "evaluate")
    assert run("evaluate", output, *words) == 130
    scored.append("stop")
    assert run("evaluate", output, *words) == 0
    before, teacher = (f"evaluate-{when}" for when in ("before", "teacher"))
    assert scored == [
        f"{before} main", "stop", f"{before} more", f"{before} news",
        f"{teacher} main", f"{teacher} more", f"{teacher} news",
    ]  # fmt: skip
    for name in ("main", "more", "news"):
        assert scores_of(output, name)["before"] == scores_of(several, name)["before"]


def test_a_teacher_that_cannot_read_a_set_is_said_to_be_left_out_on_request(inputs, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    student = save_tiny(tmp_path / "student", vocab_size=260)
    tokenizer.save_pretrained(student)
    news = write_jsonl(tmp_path / "news.jsonl", [{"prompt": "call <tool>", "response": "a"}])
    words = with_sets(inputs, student=student, student_layers=None, test=f"news={news}")
    said = refusal(capsys, "distill", tmp_path / "out", *words)
    assert f"{news}, line 1: the token '<tool>' (259) has no row in the teacher's embedding of 259 rows" in said
    assert "or leave the teacher's scores out (--no-score-teacher)" in said
    assert run("distill", tmp_path / "out", *words, "--no-score-teacher") == 0
    assert sorted(scores_of(tmp_path / "out", "news")) == ["after", "before"]


def test_a_student_without_a_teacher_is_evaluated_alone_and_a_test_set_needs_no_dev_set(inputs, tmp_path, capsys):
    words = select(options(inputs, teacher=None, student=inputs / "teacher", student_layers=None, **BRIEF), "evaluate")
    words[words.index("--dev")] = "--test"
    assert run("evaluate", tmp_path / "out", *words) == 0
    assert "test set, 8 samples" not in capsys.readouterr().out
    [(name, one)] = read_json(tmp_path / "out" / "evaluation.json")["sets"].items()
    assert (name, one["role"], one["chooses_weights"]) == ("test", "test", False)
    assert sorted(one["scores"]) == ["before"]
    assert one["scores"]["before"]["mean_kl"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "holds no sample"), ('{"prompt": "a", "response": []}', 'line 1: field "response" is an empty list')],
)
def test_a_set_without_samples_or_references_is_refused_before_a_model_is_loaded(inputs, tmp_path, capsys, text, says):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    said = refusal(capsys, "distill", tmp_path / "out", *with_sets(inputs, test=f"news={bad}"))
    assert said.startswith(f"pocl-fast distill: {bad}")
    assert says in said
    assert not (tmp_path / "out" / "difficulty.parquet").exists()


def _evaluated(output, words):
    assert run("evaluate", output, *words) == 0
    return ranks.rank()


@gloo
def test_ranks_evaluate_what_one_process_evaluates(two_ranks, tmp_path, tmp_path_factory):
    inputs = make_inputs(tmp_path_factory.mktemp("evaluated"))
    words = select(options(inputs, generation_batch_size=3), "evaluate")
    assert run("evaluate", tmp_path / "one", *words) == 0
    assert two_ranks(_evaluated, tmp_path / "two", words) == [0, 1]
    for when in ("before", "teacher"):
        for one, two in zip(*(score_rows(tmp_path / name, when) for name in ("one", "two")), strict=True):
            for name in ("cross_entropy",) if when == "teacher" else ("cross_entropy", "mean_kl"):
                assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-6)
            assert one == two
    one, two = (json.dumps(scores_of(tmp_path / name)["before"]["rouge_l"]) for name in ("one", "two"))
    assert one == two
