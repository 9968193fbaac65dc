"""A sample's tokens as text: what they say together is what the tokenizer decodes, each with what is done with it."""

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.token_view import token_view

HARD = "Hi  there,\n\tcafé 美是 😀🏳️‍🌈 \ufffd end <|end|> ಕನ್ನಡ مرحبا"


def byte_fallback():
    """As SentencePiece's: words with ▁, and a token for each byte of what is in no word."""
    words = ["▁", *"Hi", "▁the", "re", ",", "▁end", *"caf", "美"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_pieces():
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "hi", "there", "caf", "##é", ",", "end"])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[SEP]")


TOKENIZERS = {"byte-level": tiny_tokenizer, "byte-fallback": byte_fallback, "word pieces": word_pieces}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_texts_of_all_tokens_are_what_the_tokenizer_decodes(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(HARD, add_special_tokens=False).input_ids
    view = token_view(EncodedSample(0, tuple(ids[:5]), tuple(ids[5:]), False), tokenizer)
    assert view.text == decoded(tokenizer, ids)
    assert [token for one in view.tokens for token in one.ids] == ids


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_of_several_tokens_is_shown_whole_and_one_of_the_text_stays(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("a😀é\ufffdb", add_special_tokens=False).input_ids
    texts = [one.text for one in token_view(EncodedSample(0, (), tuple(ids), False), tokenizer).tokens]
    assert [text for text in texts if text.strip()] == ["a", "😀", "é", "\ufffd", "b"]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_that_a_limit_cuts_in_two_is_shown_as_bytes(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tuple(tokenizer("a😀b", add_special_tokens=False).input_ids)
    cut = len(ids) - 3
    view = token_view(EncodedSample(0, ids[:1], ids[1:cut], True), tokenizer, EncodedSample(0, ids[:1], ids[1:], False))
    assert [(one.raw, one.kind) for one in view.tokens if one.raw] == [("⟨F0 9F⟩", "supervised"), ("⟨98 80⟩", "cut")]
    assert view.text == decoded(tokenizer, ids)
    alone = token_view(EncodedSample(0, ids[:1], ids[1:cut], True), tokenizer)
    assert alone.tokens[-1].raw == "⟨F0 9F⟩"


def test_supervised_tokens_may_be_anywhere_and_what_is_between_them_is_context():
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer("asking").input_ids)
    sample = EncodedSample(0, ids[:2], ids[2:], False, supervised=((1, 2), (4, 5)))
    kinds = [(one.text, one.kind, one.place) for one in token_view(sample, tokenizer).tokens]
    assert kinds == [
        ("a", "prompt", 0),
        ("s", "supervised", 1),
        ("k", "context", 2),
        ("i", "context", 3),
        ("n", "supervised", 4),
        ("g", "context", 5),
    ]


# behind; one place within, where what is cut begins as what follows; within and behind; two places; before
@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ("abcab", "abcab(cd)"),
        ("abcd", "abc(abc)d"),
        ("acab", "a(b)cab(cd)"),
        ("acacd", "a(b)ca(b)cd"),
        ("bcabcd", "(a)bcabcd"),
    ],
)
def test_what_is_cut_stands_where_it_was(kept, shown):
    tokenizer = tiny_tokenizer()
    ids, whole = (tuple(tokenizer(text).input_ids) for text in (kept, "abcabcd"))
    view = token_view(
        EncodedSample(0, ids[:1], ids[1:], True), tokenizer, EncodedSample(0, whole[:2], whole[2:], False)
    )
    said = "".join(f"({one.text})" if one.kind == "cut" else one.text for one in view.tokens)
    assert said.replace(")(", "") == shown
    assert [one.place for one in view.tokens if one.kind != "cut"] == list(range(len(ids)))


def test_of_a_sample_that_is_left_out_all_is_cut():
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer("ab").input_ids)
    view = token_view(None, tokenizer, EncodedSample(0, ids[:1], ids[1:], False))
    assert (view.count("cut"), view.text) == (2, "ab")


def test_a_special_token_is_told_from_text_that_looks_like_it():
    tokenizer = tiny_tokenizer()
    special = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = (*tokenizer("<|end|>", split_special_tokens=True).input_ids, special)
    assert len(ids) == 8
    view = token_view(EncodedSample(0, ids[:1], ids[1:], False), tokenizer)
    assert [one.added for one in view.tokens] == [False] * 7 + [True]
    assert view.text == "<|end|><|end|>"
