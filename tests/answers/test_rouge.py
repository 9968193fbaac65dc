"""ROUGE-L against rouge-score itself, to the last bit."""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score import tokenize as rouge_tokenize
from turns import turns_during

from pocl_fast import _C
from pocl_fast.answers.rouge import rouge_l

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SCORERS = {stem: rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem) for stem in (False, True)}

# lower case that is ASCII, longer, dependent on context or not the inverse of upper case; digits other than 0-9;
# halves of surrogate pairs; marks and separators
TRAPS = "İıK\u212aſßẞΣςσŉǰﬁﬀÅ\u212baAéÉ①²½٣一😀\ud83d\udc00\u0307\u200d\u00ad\x00\x1c\x85\u2028\t\n '-_.,"
SUFFIXES = [
    "s",
    "es",
    "ies",
    "sses",
    "ing",
    "ed",
    "eed",
    "ational",
    "iveness",
    "ly",
    "er",
    "ment",
    "y",
    "e",
    "ll",
    "0",
    "9th",
]

ascii_words = st.builds(
    str.__add__, st.text("abceilnorstuyzABZ019", min_size=0, max_size=8), st.sampled_from(["", *SUFFIXES])
)
# few distinct words, so that subsequences are long
ascii_texts = st.lists(
    st.one_of(st.sampled_from(["a", "the", "running", "runs", "Run", "x1"]), ascii_words), max_size=20
).map(" ".join)
trap_texts = st.text(st.one_of(st.sampled_from(TRAPS), st.sampled_from("abks ")), max_size=30)
texts = st.one_of(st.text(max_size=60), ascii_texts, trap_texts)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def expected(prediction, references, use_stemmer):
    return tuple(SCORERS[use_stemmer].score_multi(references, prediction)["rougeL"])


def assert_equal_to_rouge_score(predictions, references, use_stemmer, threads=None):
    ours = rouge_l(predictions, references, use_stemmer=use_stemmer, threads=threads)
    as_lists = [[given] if isinstance(given, str) else given for given in references]
    want = np.array([expected(p, r, use_stemmer) for p, r in zip(predictions, as_lists, strict=True)], dtype=np.float64)
    want = want.reshape(-1, 3)
    np.testing.assert_array_equal(ours.precision, want[:, 0])
    np.testing.assert_array_equal(ours.recall, want[:, 1])
    np.testing.assert_array_equal(ours.fmeasure, want[:, 2])


@fuzz
@given(texts, st.lists(texts, min_size=1, max_size=3), st.booleans())
def test_any_text_scores_as_in_rouge_score(prediction, references, use_stemmer):
    assert_equal_to_rouge_score([prediction, prediction], [references, references[0]], use_stemmer)


@fuzz
@given(st.lists(texts, max_size=3), st.booleans())
def test_any_text_has_the_tokens_of_rouge_score(given, use_stemmer):
    stemmer = SCORERS[True]._tokenizer._stemmer if use_stemmer else None
    words = _C.tokenize(given, 1).words
    ours = {stemmer.stem(word) if stemmer and len(word) > 3 else word for word in words}
    assert ours == {token for text in given for token in rouge_tokenize.tokenize(text, stemmer)}
    assert len(set(words)) == len(words)


def test_every_code_point_is_lower_cased_and_split_as_in_python():
    # each between two letters, so that joining and splitting both show, and behind its number, so that no two words
    # are the same; one text for each width of a character: 1, 2 and 4 bytes
    for points in (range(256), range(256, 0x10000), range(0x10000, 0x110000)):
        pieces = [f"{c}q{chr(c)}q" for c in points]
        text = "-".join(pieces)
        want = list(dict.fromkeys(rouge_tokenize.tokenize(text, None)))
        assert _C.tokenize([text], 1).words == want


# 1 to 65: about one machine word; 128 and 129: about two; 512 and 513: about a strip of eight; 700: more.
# 3 words: long subsequences; 200: short ones.
@pytest.mark.parametrize("num_words", [3, 200])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 512, 513, 700])
def test_lengths_about_a_machine_word_score_as_in_rouge_score(length, num_words):
    rng = random.Random(length)
    vocabulary = [f"w{i}" for i in range(num_words)]
    lengths = [(length, length), (length, 64), (64, length), (length, 1), (length, 200)]
    predictions = [" ".join(rng.choices(vocabulary, k=a)) for a, _ in lengths]
    references = [" ".join(rng.choices(vocabulary, k=b)) for _, b in lengths]
    assert_equal_to_rouge_score(predictions, references, use_stemmer=False)


def test_a_long_text_against_itself_scores_one():
    text = " ".join(f"w{i % 700}" for i in range(5000))
    scores = rouge_l([text], [text])
    assert (scores.precision[0], scores.recall[0], scores.fmeasure[0]) == (1, 1, 1)


@pytest.mark.parametrize("use_stemmer", [False, True])
@pytest.mark.parametrize("name", ["dolly_500.jsonl", "sni_3_6.jsonl"])
def test_real_pairs_score_as_in_rouge_score(name, use_stemmer):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    references = [row["output"] for row in rows]
    # another sample's answer, or the instruction: low and middling scores; cut short, for rouge-score is slow
    others = [answer if isinstance(answer, str) else answer[0] for answer in references[1:] + references[:1]]
    predictions = [(row["instruction"] if i % 2 else others[i])[:400] for i, row in enumerate(rows)]
    references = [given[:400] if isinstance(given, str) else given[:4] for given in references]
    assert_equal_to_rouge_score(predictions[:300], references[:300], use_stemmer)


def test_of_references_with_equal_f_the_first_counts():
    # F is 1/2 for both, with precision and recall the other way round
    scores = rouge_l(["a b c", "a b c"], [["a", "a b c d e f g h i"], ["a b c d e f g h i", "a"]], use_stemmer=False)
    assert scores.fmeasure.tolist() == [0.5, 0.5]
    assert scores.precision.tolist() == [1 / 3, 1.0]
    assert scores.recall.tolist() == [1.0, 1 / 3]


def test_texts_without_tokens_score_zero():
    scores = rouge_l(["", "a", "", "?!", "一二"], ["a", "", "", ["", "?!"], "一二"])
    assert not np.any([scores.precision, scores.recall, scores.fmeasure])


def test_no_predictions_give_empty_scores():
    scores = rouge_l([], [])
    assert scores.precision.shape == scores.recall.shape == scores.fmeasure.shape == (0,)
    assert scores.fmeasure.dtype == np.float64


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_scores_do_not_depend_on_the_number_of_threads(use_stemmer):
    # 3000 pairs: a piece of the texts and several of the pairs for each thread
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("aeinrst", k=rng.randint(1, 9))) for _ in range(2000)]
    made = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 90))) for _ in range(6000)]
    predictions, references = made[:3000], [[text] * (1 + i % 3) for i, text in enumerate(made[3000:])]
    one, two, three = (rouge_l(predictions, references, use_stemmer=use_stemmer, threads=t) for t in (1, 2, 3))
    for name in ("precision", "recall", "fmeasure"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))
    assert_equal_to_rouge_score(predictions[-40:], references[-40:], use_stemmer)


@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        (["a", "b"], ["a"], ValueError, "got 1 for 2 predictions"),
        (["a", "b"], ["a", []], ValueError, r"references\[1\] is an empty list"),
        (["a", 3], ["a", "b"], TypeError, r"predictions\[1\] must be a string, got int"),
        (["a", None], ["a", "b"], TypeError, r"predictions\[1\] must be a string, got NoneType"),
        (["a", "b"], ["a", b"b"], TypeError, r"references\[1\] must be a string or a list of strings, got bytes"),
        (["a", "b"], ["a", ["b", 1.0]], TypeError, r"references\[1\]\[1\] must be a string, got float"),
        ("a", ["a"], TypeError, "predictions must be a list of strings, got one string"),
        (["a"], "a", TypeError, "references must be a list"),
    ],
)
def test_wrong_arguments_are_named(predictions, references, error, message):
    with pytest.raises(error, match=message):
        rouge_l(predictions, references)


def test_other_python_threads_run_meanwhile():
    text = "a b c d e f g h " * 15_000  # some tenths of a second
    worker = threading.Thread(target=rouge_l, args=([text], [text[::-1]]), kwargs={"threads": 1})
    assert turns_during(worker) > 20


def test_threads_below_one_are_refused():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        rouge_l(["a"], ["a"], threads=0)


def test_importing_loads_neither_torch_nor_nltk():
    code = (
        "import sys, pocl_fast.answers.rouge, pocl_fast.curriculum.stages;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'nltk', 'rouge_score')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
