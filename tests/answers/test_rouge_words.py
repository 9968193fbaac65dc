"""ROUGE-L with the tokenizers for other scripts, against rouge-score given the same ones; and where it is blind."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.rouge_words import characters, unicode_words, unseen, unseen_line

UNSPACED = re.compile(r"(CJK|IDEOGRAPHIC|HIRAGANA|KATAKANA|BOPOMOFO|YI|TANGUT|THAI|LAO|KHMER|MYANMAR)\b")


def by_rule(text):
    """The rule of `unicode_words` again, a character at a time."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words, word = [], ""
    for char in folded:
        alone = bool(UNSPACED.match(unicodedata.name(char, "")))
        part_of_word = unicodedata.category(char)[0] in "LMN"
        if word and (alone or not part_of_word):
            words.append(word)
            word = ""
        if part_of_word and alone:
            words.append(char)
        elif part_of_word:
            word += char
    return [*words, word] if word else words


class Tokenizer:
    def __init__(self, tokenize):
        self.tokenize = tokenize


SCORERS = {
    "unicode_words": rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer(by_rule)),
    "characters": rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer(characters)),
}
ALPHABET = "ab1 _-.,答案好ひらカナー々ไทยกำéßİΣ한글हिन्दी１２ﬁ\u0301٣"
texts = st.one_of(st.text(max_size=30), st.text(st.sampled_from(ALPHABET), max_size=30))


@settings(max_examples=100, deadline=None)
@given(texts, st.lists(texts, min_size=1, max_size=3), st.sampled_from(sorted(SCORERS)))
def test_scores_are_those_of_rouge_score_with_that_tokenizer(prediction, references, tokenizer):
    ours = rouge_l([prediction, prediction], [references, references[0]], tokenizer=tokenizer)
    for place, accepted in enumerate((references, references[:1])):
        want = SCORERS[tokenizer].score_multi(accepted, prediction)["rougeL"]
        assert (ours.precision[place], ours.recall[place], ours.fmeasure[place]) == tuple(want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Die Größe, größer!", ["die", "grösse", "grösser"]),
        ("答案是42个", ["答", "案", "是", "42", "个"]),
        ("ひらがなカー々", list("ひらがなカー々")),
        ("ไทย", list("ไทย")),
        ("한글 문장", ["한글", "문장"]),  # written with spaces
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks
        ("snake_case it's", ["snake", "case", "it", "s"]),
        ("cafe\u0301 ＡＢＣ１２", ["café", "abc12"]),
        ("٣٤ ½", ["٣٤", "1", "2"]),
        ("?!", []),
    ],
)
def test_unicode_words_are_runs_of_letters_marks_and_numbers(text, words):
    assert unicode_words(text) == [unicodedata.normalize("NFKC", word) for word in words]


def test_characters_are_all_but_white_space():
    assert characters(" A\u3000b\n答?") == ["a", "b", "答", "?"]


def test_equal_texts_score_one_where_rouge_scores_own_words_score_zero():
    texts = ["答案好", "Привет, мир", "ไทย"]
    for tokenizer, want in (("rouge_score", 0.0), ("unicode_words", 1.0), ("characters", 1.0)):
        np.testing.assert_array_equal(rouge_l(texts, texts, tokenizer=tokenizer).fmeasure, want)
    assert rouge_l(["你好吗"], ["你好的"], tokenizer="characters").fmeasure[0] == pytest.approx(2 / 3)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(
        ValueError, match="tokenizer must be one of rouge_score, unicode_words, characters; got 'words'"
    ):
        rouge_l(["a"], ["a"], tokenizer="words")


@pytest.mark.parametrize(
    ("text", "blind_for"),
    [
        ("答案", {"rouge_score"}),
        ("答案是二零一九年的 A", {"rouge_score"}),  # the A alone is seen
        ("Привет", {"rouge_score"}),
        ("für größere Mühe", set()),
        ("x = 答", set()),  # it sees half of the letters
        ("<", {"rouge_score", "unicode_words"}),
        ("plain words", set()),
    ],
)
def test_a_tokenizer_is_blind_for_a_text_of_which_it_sees_less_than_half(text, blind_for):
    assert {one for one in ("rouge_score", "unicode_words", "characters") if unseen(text, one)} == blind_for


def test_the_line_counts_the_references_and_names_the_option():
    said = unseen_line(["答案", "yes", "好"], "rouge_score", "dev.jsonl")
    assert said.startswith(
        "dev.jsonl: ROUGE-L is blind for 2 of 3 references: its tokenizer rouge_score sees a-z and 0-9"
    )
    assert said.endswith("Give --rouge-tokenizer unicode_words or characters for these")
    assert unseen_line(["<", "答"], "unicode_words", "d").endswith("Give --rouge-tokenizer characters for these")
    assert unseen_line(["yes"], "rouge_score", "d") is None
    assert unseen_line([], "rouge_score", "d") is None
