"""Student and teacher as a pair: tokens, merges, rows of the vocabulary, the top-k that both have, sizes."""

import copy
import re

import pytest
import torch
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run, select
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.pair import check_same_vocabulary
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

LIMITS = {"max_length": 160, "max_prompt_length": 120}


def config(folder, **changed):
    settings = {
        "use_cpu": True, "precision": "fp32", "stages": 1, "epochs_per_stage": 1, "per_device_train_batch_size": 4,
        "eval_strategy": "no", "curriculum": "none", "max_new_tokens": 4, **LIMITS,
    }  # fmt: skip
    return PoclConfig(str(folder), **(settings | changed))


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_tokens_that_one_side_has_alone_are_fine_at_the_end_and_refused_under_one_id():
    ours, longer, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    longer.add_tokens(["<|extra|>"])
    check_same_vocabulary(ours, tiny_tokenizer())
    check_same_vocabulary(ours, longer)
    check_same_vocabulary(longer, ours)
    other.add_tokens(["<|more|>"])
    with pytest.raises(InputError, match=r"\(260 and 260 tokens\): token 259 is '<\|extra\|>' for the student"):
        check_same_vocabulary(longer, other)


@pytest.mark.parametrize("kept", ["text", "parse"])
def test_a_control_token_of_the_student_alone_may_stand_in_a_text_that_is_kept(kept):
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|extra|>"]})
    samples = samples_from([{"prompt": "what is <|extra|>?", "response": "<|extra|>"}], "x")
    encoder = SampleEncoder(ours, special_tokens=kept)
    data = SampleSet(samples, encode_all(samples, encoder, long_prompts="error", name="x", **LIMITS)[0])
    if kept == "text":
        check_same_vocabulary(ours, theirs, data)
    else:
        with pytest.raises(InputError, match=r"the token '<\|extra\|>' \(259\) is not in the teacher's tokenizer"):
            check_same_vocabulary(ours, theirs, data)


def test_a_token_that_has_another_id_on_the_other_side_is_refused_though_no_id_has_two_tokens():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    ours.add_tokens(["<a>", "<b>"])
    theirs.add_tokens(["<b>"])
    with pytest.raises(InputError, match=r"token 259 is '<a>' for the student and '<b>' for the teacher"):
        check_same_vocabulary(ours, theirs)
    hole = bpe({"a": 0, "b": 1, "c": 3}, [])  # 2 is no token
    with pytest.raises(InputError, match="'c' is token 3 for the student and token 2 for the teacher"):
        check_same_vocabulary(hole, bpe({"a": 0, "b": 1, "c": 2}, []))


def bpe(vocab, merges, **parts):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


LETTERS = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "A", "B", "C"])}
ALL = [("a", "b"), ("b", "c"), ("ab", "c")]


@pytest.mark.parametrize(
    "theirs",
    [
        bpe(LETTERS, [("a", "b"), ("ab", "c")]),  # a merge is missing
        bpe(LETTERS, [("b", "c"), ("a", "b"), ("ab", "c")]),  # in another order: "abc" ends as a, bc
        bpe(LETTERS, ALL, normalizer=normalizers.Lowercase()),
        bpe(LETTERS, ALL, pre_tokenizer=pre_tokenizers.Split("b", "isolated")),
    ],
    ids=["merges", "order of merges", "normalizer", "pre-tokenizer"],
)
def test_tokenizers_with_the_same_tokens_that_cut_a_text_differently_are_refused(theirs):
    with pytest.raises(InputError, match=r"is cut differently by the two tokenizers: from its token \d+ on the stud"):
        check_same_vocabulary(bpe(LETTERS, ALL), theirs)


def test_scores_of_a_unigram_model_are_compared_too():
    def unigram(long):
        pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", long)]
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0, False)))

    check_same_vocabulary(unigram(-1.5), unigram(-1.5))
    with pytest.raises(InputError, match=r"is cut differently .* the student's has \['ab'"):
        check_same_vocabulary(unigram(-1.5), unigram(-3.0))


def test_tokenizers_that_are_made_differently_and_cut_alike_are_said_to_be():
    said = []
    other = bpe(LETTERS, ALL, normalizer=normalizers.Replace("\u2603", "a"))
    check_same_vocabulary(bpe(LETTERS, ALL), other, say=said.append)
    assert len(said) == 1
    assert "are made differently (normalizer), but cut all of " in said[0]
    check_same_vocabulary(bpe(LETTERS, ALL), bpe(LETTERS, ALL), say=said.append)
    assert len(said) == 1


def test_a_sample_that_the_two_cut_differently_is_named():
    other = tiny_tokenizer()
    other.add_tokens(["tool"])  # the student cuts it into letters
    records = [*arithmetic(3), {"instruction": "which tool", "output": "none"}]
    samples = samples_from(records, "train")
    encoded, _ = encode_all(samples, SampleEncoder(tiny_tokenizer()), long_prompts="error", name="train", **LIMITS)
    with pytest.raises(InputError, match=r"^line 4: the text 'which tool' is cut differently .* from its token 7 on"):
        check_same_vocabulary(tiny_tokenizer(), other, SampleSet(samples, encoded), lambda s: f"line {s.line}")
    check_same_vocabulary(tiny_tokenizer(), other, SampleSet(samples, encoded[:3]), lambda s: f"line {s.line}")


def test_merges_are_compared_on_the_command_line_before_anything_is_computed(tmp_path, capsys):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    save_tiny(tmp_path / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(tmp_path / "student")
    words = options(inputs, student=tmp_path / "student", student_layers=None)
    said = refusal(capsys, "distill", tmp_path / "out", *words)
    assert "is cut differently by the two tokenizers" in said
    assert not (tmp_path / "out" / "difficulty.parts").exists()


# -- rows --------------------------------------------------------------------------------------------------------------

TOOL = {"instruction": "call <tool>", "output": "<tool>now"}


def tokenizer_with(token, **kwargs):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([token], **kwargs)
    return tokenizer


@pytest.mark.parametrize(("student_rows", "whose"), [(260, "teacher"), (259, "student")])
def test_a_samples_token_without_a_row_is_named_when_the_trainer_is_made(tmp_path, student_rows, whose):
    data = [*arithmetic(3), TOOL, *arithmetic(2, 10), TOOL]
    says = (
        rf"^train_dataset, record 4: the token '<tool>' \(259\) has no row in the {whose}'s embedding of 259 rows"
        r" \(and so it is with 1 more samples\)"
    )
    with pytest.raises(InputError, match=says):
        PoclTrainer(
            tiny_model(vocab_size=student_rows).float(), tiny_model(layers=3, seed=1), config(tmp_path), data, None,
            tokenizer_with("<tool>"),
        )  # fmt: skip


def test_a_token_without_a_row_that_no_sample_has_is_said(tmp_path, capsys):
    args = config(tmp_path)
    trainer = PoclTrainer(
        tiny_model().float(), tiny_model(layers=3, seed=1), args, arithmetic(4), None, tokenizer_with("<tool>")
    )
    assert "1 of the tokenizer's 260 tokens, the first of them '<tool>' (259), have no row" in capsys.readouterr().out
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_held_out_samples_token_needs_a_row_of_the_student_alone(tmp_path):
    args = config(tmp_path, eval_strategy="epoch")
    tokenizer, path = tokenizer_with("<tool>"), write_jsonl(tmp_path / "dev.jsonl", [*arithmetic(1), TOOL])
    with pytest.raises(InputError, match=r"dev\.jsonl, line 2: the token '<tool>' \(259\) has no row in the student's"):
        PoclTrainer(tiny_model().float(), tiny_model(seed=1), args, arithmetic(4), path, tokenizer)
    PoclTrainer(tiny_model(vocab_size=260).float(), tiny_model(seed=1), args, arithmetic(4), path, tokenizer)


@pytest.mark.parametrize("special", [{"pad_token": "[PAD]"}, {"eos_token": "[END]"}, {"bos_token": "[B]"}])
def test_a_special_token_of_the_tokenizer_beyond_the_students_embedding_is_refused(tmp_path, special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(special)
    [(name, text)] = special.items()
    says = f"the tokenizer's {name} {text!r} has id 259, and the student's embedding has 259 rows: add rows"
    with pytest.raises(InputError, match=re.escape(says)):
        PoclTrainer(
            tiny_model().float(), tiny_model(layers=3, seed=1), config(tmp_path), arithmetic(4), None, tokenizer
        )


@pytest.mark.parametrize("known", ["student", "teacher"])
def test_the_command_line_names_the_line_and_the_token_that_one_tokenizer_lacks(tmp_path, capsys, known):
    inputs = make_inputs(tmp_path, train=4, dev=2, vocab_size=264)  # rows enough: what is lacking is the token
    write_jsonl(inputs / "train.jsonl", [*arithmetic(3), TOOL])
    save_tiny(tmp_path / "student", vocab_size=264)
    tokenizer_with("<tool>").save_pretrained(tmp_path / known)
    words = options(inputs, student=tmp_path / "student", student_layers=None)
    said = refusal(capsys, "distill", tmp_path / "out", *words)
    assert f"{inputs / 'train.jsonl'}, line 4: the t" in said
    assert ("the token '<tool>' (259) is not in the teacher's tokenizer" in said) == (known == "student")
    assert ("the text 'call <tool>' is cut differently" in said) == (known == "teacher")
    assert not (tmp_path / "out" / "difficulty.parts").exists()


def test_the_command_line_reads_the_rows_of_models_before_their_weights(tmp_path, capsys):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    write_jsonl(inputs / "train.jsonl", [TOOL, *arithmetic(3)])
    for name in ("teacher", "student"):
        save_tiny(tmp_path / name, vocab_size=260 if name == "student" else 259)
        tokenizer_with("<tool>").save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    words = options(inputs, student=tmp_path / "student", student_layers=None)
    said = refusal(capsys, "distill", tmp_path / "out", *words)
    assert "train.jsonl, line 1: the token '<tool>' (259) has no row in the teacher's embedding of 259 rows" in said


# -- the top-k that both have ------------------------------------------------------------------------------------------


def kd_of(folder, mode, teacher_rows, student_rows=259, **options):
    trainer = PoclTrainer(
        tiny_model(vocab_size=student_rows).float(),
        tiny_model(layers=3, vocab_size=teacher_rows, seed=1),
        config(folder, cache_mode=mode, cache_dtype="fp32", alpha=[0.0], temperature=[1.0], **options),
        arithmetic(8), None, tiny_tokenizer(),
    )  # fmt: skip
    return first_loss(trainer)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_whole_top_k_of_a_wider_teacher_is_its_hidden_states_loss(tmp_path, divergence):
    hidden = kd_of(tmp_path / "a", "hidden", 320, divergence=divergence)
    top = kd_of(tmp_path / "b", "topk", 320, divergence=divergence, cache_top_k=259)
    assert top == pytest.approx(hidden, rel=1e-4)


def test_the_top_k_of_a_wider_teacher_is_of_the_students_tokens_and_has_a_cache_of_its_own(tmp_path):
    from tiny_cache import samples
    from tiny_teacher import ready

    many, model = samples(vocab=250), ready(tiny_model(vocab_size=320, seed=1))
    teacher = Teacher(model, tmp_path, cache_mode="topk", top_k=7, student_entries=259)
    ids = torch.tensor([many[0].prompt_ids + many[0].response_ids])
    with torch.no_grad():
        want = model(ids).logits[0, 3:-1, :259].double().log_softmax(-1).topk(7)
    for top in (teacher.top_k(many[:1]), teacher.top_k(many[:1]), teacher.live(many[:1])):
        assert torch.equal(top.indices.long(), want.indices)
        torch.testing.assert_close(top.log_probs.double(), want.values, rtol=1e-5, atol=1e-5)
    assert Teacher(model, tmp_path, cache_mode="topk", top_k=7).cache.missing(many[:1])
    assert Teacher(model, tmp_path, cache_mode="topk", top_k=7, student_entries=250).cache.missing(many[:1])
    with pytest.raises(InputError, match="a top-k of 260: must be within 1 and the vocabulary's 259 tokens"):
        Teacher(model, tmp_path, cache_mode="topk", top_k=260, student_entries=259)


def test_a_top_k_that_does_not_stand_for_the_students_vocabulary_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(
        InputError, match=r"student's lm_head has 264 rows and the teacher's 259.* take cache_mode hidd"
    ):
        kd_of(tmp_path, "topk", 259, student_rows=264)
    assert kd_of(tmp_path / "hidden", "hidden", 259, student_rows=264) > 0
    made = Teacher(tiny_model(vocab_size=320, seed=1), tmp_path / "cache", cache_mode="topk", top_k=5)
    with pytest.raises(InputError, match=r"most likely of 320 tokens.* 259 rows: make it with .*student_entries=259"):
        PoclTrainer(tiny_model().float(), made, config(tmp_path / "c"), arithmetic(4), None, tiny_tokenizer())


def test_a_run_keeps_the_top_k_of_the_students_tokens(tmp_path):
    inputs = make_inputs(tmp_path, train=4, dev=2, vocab_size=320)
    save_tiny(tmp_path / "student")
    words = options(inputs, student=tmp_path / "student", student_layers=None, cache_mode="topk")
    assert run("cache", tmp_path / "out", *select(words, "cache")) == 0
    [folder] = (tmp_path / "out" / "teacher_cache").iterdir()
    assert folder.name.endswith("-top64-of-259")


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_a_student_as_large_as_its_teacher_and_lm_heads_of_other_lengths_are_said(tmp_path, capsys):
    teacher = tiny_model(vocab_size=264)
    PoclTrainer(
        tiny_model(layers=3).float(), copy.deepcopy(teacher), config(tmp_path), arithmetic(4), None, tiny_tokenizer()
    )
    said = capsys.readouterr().out
    assert said.count("the student is larger than its teacher (") == 1
    assert said.count("the student's lm_head has 259 rows and the teacher's 264: the divergence is over the 259") == 1
    PoclTrainer(
        tiny_model(layers=1).float(), copy.deepcopy(teacher), config(tmp_path / "b"), arithmetic(4), None,
        tiny_tokenizer(),
    )  # fmt: skip
    assert "its teacher (" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"student_layers": 4}, {"student_layers": None, "student": "teacher"}])
def test_a_run_says_at_once_that_its_student_is_the_whole_teacher(tmp_path, capsys, given):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    if "student" in given:
        given = given | {"student": inputs / "." / ".." / inputs.name / "teacher"}  # written in another way
    (inputs / "teacher" / "model.safetensors").unlink()  # before anything is loaded
    run("distill", tmp_path / "out", *options(inputs, **given))
    assert "the student is the teacher itself, " in capsys.readouterr().out


def test_a_run_reads_of_configurations_how_the_two_models_differ(tmp_path, capsys):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    save_tiny(tmp_path / "student", layers=5, vocab_size=264)
    (tmp_path / "student" / "model.safetensors").unlink()  # before anything is loaded
    words = {"student": tmp_path / "student", "student_layers": None}
    said = refusal(capsys, "distill", tmp_path / "a", *options(inputs, **words, cache_mode="topk"))
    assert "the student's lm_head has 264 rows and the teacher's 259" in said
    run("distill", tmp_path / "b", *options(inputs, **words))
    said = capsys.readouterr().out
    assert said.count("the student is larger than its teacher (") == 1
    assert said.count("the divergence is over the 259 entries that both have") == 1
