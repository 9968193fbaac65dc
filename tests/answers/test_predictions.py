"""`evaluate --predictions`: the published evaluation to 4 decimals, and one clear error for what cannot be scored."""

import gzip
import json
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rouge_score import rouge_scorer

from pocl_fast.answers.exact_match import published_exact_matches
from pocl_fast.answers.intervals import bootstrap_interval, mean_interval
from pocl_fast.answers.predictions import read_references, score_answers
from pocl_fast.cli import main

SNI = Path(__file__).resolve().parents[3] / "shared" / "data" / "sni_3_6.jsonl"
REFERENCES = [
    "The cat sat on the mat.",
    ["Yes!", "Yes, it is."],
    ["42"],
    "- 1",
    "Привет, мир",
    ["No.", ""],
    "running dogs",
]
ANSWERS = ["a cat sat on mats", "yes it is", "-42", "1", "привет мир", "?!", "Dogs run"]


def normal(text):
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(kept.split())


def published(answers, references):
    """The published evaluation, written again from its description: exact match and ROUGE-L in percent, 4 decimals."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    exact = rouge = 0.0
    for answer, accepted in zip(answers, references, strict=True):
        accepted = accepted if isinstance(accepted, list) else [accepted]
        exact += max(normal(answer) == normal(text) for text in accepted)
        rouge += max(scorer.score(prediction=answer, target=text)["rougeL"].fmeasure for text in accepted)
    count = len(references)
    return {"exact_match_sni": round(100.0 * exact / count, 4), "rouge_l": round(100.0 * rouge / count, 4)}


def lines(path, values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return str(path)


@pytest.fixture
def references(tmp_path):
    return lines(tmp_path / "r.jsonl", [{"instruction": "?", "output": given} for given in REFERENCES])


@pytest.fixture
def answers(tmp_path):
    return lines(tmp_path / "p.jsonl", [{"text": answer} for answer in ANSWERS])


def scored(output, *words):
    assert main(["evaluate", *words, "--output", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def refused(capsys, *words):
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pocl-fast evaluate: ")
    assert said.count("\n") == 1
    return said.removeprefix("pocl-fast evaluate: ")


def changed(text, rng):
    """An answer made of a reference: cut, shouted, in another order, in another language, empty, or punctuation."""
    words = text.split()
    ways = [
        words,
        words[:-1],
        [],
        ["Привет", *words],
        words[::-1],
        [word.upper() + "!" for word in words],
        ["-1,000.5"],
    ]
    return " ".join(rng.choice(ways))


def test_the_figures_are_those_of_the_published_code_to_4_decimals(tmp_path, answers, references):
    [found] = scored(tmp_path / "s.json", "--predictions", answers, "--references", references)["files"]
    want = published(ANSWERS, REFERENCES)
    assert {name: found[name] for name in want} == want
    assert want["exact_match_sni"] == round(100 * 5 / 7, 4)  # -42 is 42 there, "?!" is an empty reference


@pytest.mark.skipif(not SNI.exists(), reason="sni_3_6.jsonl is not on this machine")
def test_real_references_score_as_by_the_published_code(tmp_path):
    rows = [json.loads(line)["output"] for line in SNI.read_text(encoding="utf-8").splitlines()][:300]
    rng = random.Random(0)
    made = [changed(rng.choice(row if isinstance(row, list) else [row]), rng) for row in rows]
    files = [lines(tmp_path / "p.jsonl", [{"text": answer} for answer in made])]
    given = lines(tmp_path / "r.jsonl", [{"output": row} for row in rows])
    [found] = scored(tmp_path / "s.json", "--predictions", *files, "--references", given)["files"]
    want = published(made, rows)
    assert {name: found[name] for name in want} == want
    assert 20 < want["rouge_l"] < 90


def test_means_are_summed_in_the_order_of_the_published_code():
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefg", k=rng.randint(1, 9))) for _ in range(2000)]
    scores = score_answers("p", texts, [[text] for text in texts[1:] + texts[:1]])
    total = 0.0
    for one in scores.samples["rouge_l"]:
        total += one
    assert scores.means()["rouge_l"] == 100.0 * total / 2000


def test_published_exact_match_passes_over_all_punctuation_and_ours_does_not(tmp_path, answers, references):
    [found] = scored(tmp_path / "s.json", "--predictions", answers, "--references", references)["files"]
    assert found["exact_match"] == round(100 * 2 / 7, 4)  # "yes it is" and the Russian
    assert published_exact_matches(["-1", "a-b", "a b", "¿que?"], [["1"], ["ab"], ["ab"], ["que"]]) == [
        *(True, True, False),
        False,  # of ASCII's punctuation alone
    ]


# our own files of answers; Super-NaturalInstructions'; others' names; a string a line
@pytest.mark.parametrize(
    "form",
    [
        lambda text: {"text": text},
        lambda text: {"line": 1, "prompt": "?", "references": ["x"], "answer": text},
        lambda text: {"id": "task1", "prediction": text},
        lambda text: {"response": text},
        lambda text: {"prompt": "?", "predict": text, "label": "x"},
        lambda text: text,
    ],
)
def test_answers_are_read_in_many_forms(tmp_path, references, form):
    given = lines(tmp_path / "p.jsonl", [form(text) for text in ANSWERS])
    [found] = scored(tmp_path / "s.json", "--predictions", given, "--references", references)["files"]
    want = published(ANSWERS, REFERENCES)
    assert {name: found[name] for name in want} == want


def test_arrays_tables_and_compressed_files_are_read(tmp_path, answers, references):
    want = published(ANSWERS, REFERENCES)
    files = [tmp_path / name for name in ("array.json", "strings.json", "p.jsonl.gz", "p.parquet")]
    files[0].write_text(json.dumps([{"text": text} for text in ANSWERS], indent=1))
    files[1].write_text(json.dumps(ANSWERS))
    files[2].write_bytes(gzip.compress(Path(answers).read_bytes()))
    pq.write_table(pa.table({"text": ANSWERS}), files[3])
    found = scored(tmp_path / "s.json", "--predictions", *map(str, files), "--references", references)["files"]
    assert [{name: one[name] for name in want} for one in found] == [want] * 4


@pytest.mark.parametrize(
    ("record", "accepted"),
    [
        ({"output": "b"}, ["b"]),
        ({"prompt": "a", "response": ["b", "c"]}, ["b", "c"]),
        ({"id": "1", "references": ["b", ""], "answer": "c", "output": "d"}, ["b", ""]),
        ({"prompt": "a", "completion": "b"}, ["b"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["b"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["b"]),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            ["b"],
        ),
        ("b", ["b"]),
    ],
)
def test_references_are_read_of_any_record_of_the_project(tmp_path, record, accepted):
    assert read_references(lines(tmp_path / "r.jsonl", [record] * 2))[0] == [accepted] * 2


def test_a_field_can_be_named(tmp_path, capsys):
    given = lines(tmp_path / "p.jsonl", [{"text": "the prompt", "answer": "a b", "gold": "a b"}])
    words = ("--predictions", given, "--references", given)
    said = refused(capsys, *words, "--reference-field", "gold")
    assert 'line 1: both "text" and "answer" are there: --prediction-field NAME says which one is meant' in said
    fields = ("--prediction-field", "answer", "--reference-field", "gold")
    [found] = scored(tmp_path / "s.json", *words, *fields)["files"]
    assert found["rouge_l"] == found["exact_match"] == 100


def test_the_samples_that_lm_eval_writes_are_scored(tmp_path):
    made = {"doc_id": 0, "doc": {"output": "a b"}, "target": "a b", "resps": [["a b"]], "filtered_resps": ["a b"]}
    given = lines(tmp_path / "samples.jsonl", [made])
    fields = ("--prediction-field", "filtered_resps", "--reference-field", "target")
    [found] = scored(tmp_path / "s.json", "--predictions", given, "--references", given, *fields)["files"]
    assert found["rouge_l"] == 100


def test_several_files_have_intervals_over_files_and_over_samples(tmp_path, capsys, references):
    rng = random.Random(3)
    made = [[changed(given if isinstance(given, str) else given[0], rng) for given in REFERENCES] for _ in range(3)]
    files = [lines(tmp_path / f"seed{k}.jsonl", [{"text": text} for text in texts]) for k, texts in enumerate(made)]
    found = scored(tmp_path / "s.json", "--predictions", *files, "--references", references)
    accepted = [[given] if isinstance(given, str) else given for given in REFERENCES]
    scores = np.array([score_answers("", texts, accepted).samples["rouge_l"] for texts in made]) * 100
    rouge = found["scores"]["rouge_l"]
    assert rouge["mean"] == pytest.approx(scores.mean())
    assert rouge["spread"] == pytest.approx(scores.mean(axis=1).std())
    assert rouge["over_files"] == pytest.approx(mean_interval(scores.mean(axis=1))[1:])
    assert rouge["over_samples"] == pytest.approx(bootstrap_interval(scores.mean(axis=0))[1:])
    said = capsys.readouterr().out
    assert re.search(rf"mean ± spread +{rouge['mean']:.2f} ± {rouge['spread']:.2f}", said)
    assert "95 % over 3 files" in said


def test_a_pattern_stands_for_several_files(tmp_path, references):
    for seed in (1, 2):
        lines(tmp_path / f"seed{seed}.jsonl", [{"text": text} for text in ANSWERS[::seed] + ANSWERS[: 3 * (seed - 1)]])
    found = scored(tmp_path / "s.json", "--predictions", str(tmp_path / "seed*.jsonl"), "--references", references)
    assert [one["predictions"] for one in found["files"]] == [str(tmp_path / f"seed{seed}.jsonl") for seed in (1, 2)]


def test_one_file_has_no_interval_over_seeds_and_that_is_said(tmp_path, capsys, answers, references):
    found = scored(tmp_path / "s.json", "--predictions", answers, "--references", references)
    assert found["scores"]["rouge_l"]["over_files"] is None
    said = capsys.readouterr().out
    assert "one file of answers: no interval over training seeds" in said
    assert "in percent, the best over up to 2 references" in said
    assert "ROUGE-L is blind for" in said  # for the Russian and "- 1"


def test_the_tokenizer_of_rouge_can_be_chosen(tmp_path, answers, references):
    words = ("--predictions", answers, "--references", references, "--rouge-tokenizer", "unicode_words")
    found = scored(tmp_path / "s.json", *words)
    assert found["rouge_tokenizer"] == "unicode_words"
    assert found["files"][0]["rouge_l"] != published(ANSWERS, REFERENCES)["rouge_l"]


def test_empty_answers_are_counted_and_score_0(tmp_path, capsys):
    given = lines(tmp_path / "p.jsonl", [{"text": ""}, {"text": " "}, {"text": "b"}])
    other = lines(tmp_path / "r.jsonl", [{"output": "b"}] * 3)
    [found] = scored(tmp_path / "s.json", "--predictions", given, "--references", other)["files"]
    assert found["rouge_l"] == found["exact_match_sni"] == 33.3333
    assert f"{given}: 2 of 3 answers are empty: they score 0" in capsys.readouterr().out


def test_a_folder_as_output_has_a_file_of_scores(tmp_path, answers, references):
    words = ("--predictions", answers, "--references", references, "--output", str(tmp_path / "new" / "folder"))
    assert main(["evaluate", *words]) == 0
    assert json.loads((tmp_path / "new/folder/prediction-scores.json").read_text())["samples"] == 7


@pytest.mark.parametrize(
    ("predictions", "references", "says"),
    [
        ([{"text": "a"}] * 2, [{"output": "a"}] * 3, "has 2 answers, and {r} has 3 references: the same line of both"),
        ([{"texts": "a"}], [{"output": "a"}], "{p}, line 1: none of the fields text, prediction, answer"),
        ([{"text": "a"}, {"x": 1, "y": 2}], [{"output": "a"}] * 2, "{p}, line 2: none of the fields"),
        ([{"text": None}], [{"output": "a"}], '{p}, line 1: field "text" must be the answer\'s text, got null'),
        ([{"text": ["a", "b"]}], [{"output": "a"}], '{p}, line 1: field "text" must be the answer\'s text, got list'),
        (["a", 3], [{"output": "a"}] * 2, "{p}, line 2: the record must be the answer's text, got int"),
        ([], [{"output": "a"}], "{p} holds no answer"),
        ([{"text": "a"}], [], "{r} holds no reference"),
        ([{"text": "a"}], [{"output": []}], '{r}, line 1: field "output" is an empty list'),
        (
            [{"text": "a"}],
            [{"output": ["a", 3]}],
            '{r}, line 1: field "output" must be a text or a list of texts, got int',
        ),
        ([{"text": "a"}], [{"input": "a"}], "{r}, line 1: none of the fields references, response, output, completion"),
        (
            [{"id": 1, "text": "a"}, {"id": 2, "text": "a"}],
            [{"id": 1, "output": "a"}, {"id": 3, "output": "a"}],
            '{p}, answer 2, has "id" 2, and {r} has 3 there: bring both into the same order',
        ),
    ],
)
def test_what_cannot_be_scored_is_one_message(tmp_path, capsys, predictions, references, says):
    p, r = lines(tmp_path / "p.jsonl", predictions), lines(tmp_path / "r.jsonl", references)
    assert says.format(p=p, r=r) in refused(capsys, "--predictions", p, "--references", r)


def test_files_that_are_no_json_are_named_with_their_line(tmp_path, capsys, references):
    cut = tmp_path / "cut.jsonl"
    cut.write_text('{"text": "a"}\n{"text": \n')
    assert "cut.jsonl, line 2: not JSON" in refused(capsys, "--predictions", str(cut), "--references", references)
    cut.write_text('"a"\n"b\n')
    assert "cut.jsonl, line 2: Unterminated" in refused(capsys, "--predictions", str(cut), "--references", references)
    cut.write_bytes(b'"a\xff"\n')
    assert "cut.jsonl is not UTF-8" in refused(capsys, "--predictions", str(cut), "--references", references)
    missing = str(tmp_path / "none.jsonl")
    assert "No such file" in refused(capsys, "--predictions", missing, "--references", references)


def test_options_that_do_not_go_together_are_one_message(tmp_path, capsys, answers, references):
    assert "--references needs --predictions FILE" in refused(capsys, "--references", references)
    assert "--predictions needs --references FILE" in refused(capsys, "--predictions", answers)
    assert "--predictions needs a file" in refused(capsys, "--predictions", "--references", references)
    both = ("--predictions", answers, "--predictions", references, "--references", references)
    assert "--predictions is given twice: name all files behind one" in refused(capsys, *both)
    twice = ("--predictions", answers, answers, "--references", references)
    assert f"--predictions {answers} is given twice" in refused(capsys, *twice)
    folder = tmp_path / "scores.json"
    folder.mkdir()
    said = refused(capsys, "--predictions", answers, "--references", references, "--output", str(folder))
    assert "is a folder with the name of a file" in said
    blocked = str(Path(answers) / "new")
    said = refused(capsys, "--predictions", answers, "--references", references, "--output", blocked)
    assert f"cannot write --output {blocked}" in said


def test_an_option_of_runs_is_refused_here(capsys, answers, references):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--predictions", answers, "--references", references, "--student", "x"])
    assert stop.value.code == 2
    assert "--student" in capsys.readouterr().err


def test_scoring_loads_no_torch(answers, references):
    code = (
        "import sys; from pocl_fast.cli import main;"
        f"main(['evaluate', '--predictions', {answers!r}, '--references', {references!r}]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
