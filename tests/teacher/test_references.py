"""The teacher's answers as references: generated once, resumed after a kill, and never another teacher's."""

import os
import signal
from dataclasses import replace

import pytest
from ranks import gloo
from test_teacher_cache_processes import output_of, python
from tiny import tiny_model
from tiny_cache import samples

from pocl_fast.answers.answerer import Answerer, AnswerLimits
from pocl_fast.answers.decoding import generate
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.references import _read, prompt_key, teacher_answers
from pocl_fast.teacher.teacher import teacher_fingerprint

END = 258
LIMITS = AnswerLimits(max_new_tokens=5, max_length=64, end_id=END)


def asking(model=None, *, batch_size=4, batch_tokens=None, **changes):
    options = {"limits": LIMITS, "end_ids": {END}, "temperature": 0.0}
    return Answerer(TorchEngine(model or tiny_model(), 256, batch_size, batch_tokens), **(options | changes))


def answers(folder, many, answerer=None, teacher="t", **options):
    return teacher_answers(many, folder, answerer or asking(), teacher=teacher, **options)


class Never:
    """An answerer that must not be asked."""

    def __init__(self, like):
        self.limits, self.settings = like.limits, like.settings

    def __call__(self, *_):
        raise AssertionError("asked again")


def test_the_responses_are_the_models_own_greedy_answers(tmp_path):
    many = samples(10)
    made = answers(tmp_path, many)
    want = generate(
        tiny_model(), [s.prompt_ids for s in many], max_new_tokens=5, end_ids={END}, pad_id=256, batch_size=4
    )
    assert [list(m.response_ids) for m in made] == [w if len(w) == 5 else [*w, END] for w in want]
    assert [(m.index, m.prompt_ids, m.truncated) for m in made] == [
        (s.index, s.prompt_ids, len(w) == 5) for s, w in zip(many, want, strict=True)
    ]


def test_they_are_generated_once_and_what_is_new_is_added(tmp_path, capsys):
    made = answers(tmp_path, samples(10))
    assert answers(tmp_path, samples(10), Never(asking())) == made
    assert "the teacher answers 10 of 10 prompts" in capsys.readouterr().out
    other = [EncodedSample(0, s.prompt_ids, s.response_ids, False) for s in samples(3, seed=5)]
    both = answers(tmp_path, [*samples(10)[::-1], *other])
    assert both[:10] == made[::-1]
    assert "the teacher answers 3 of 13 prompts" in capsys.readouterr().out


def test_a_sampled_answer_is_of_the_prompt_and_the_seed_wherever_the_sample_stands(tmp_path):
    hot = asking(temperature=1.0)
    made = answers(tmp_path / "a", samples(10), hot)
    moved = [replace(sample, index=99 - sample.index) for sample in samples(10)[::-1]]
    again = answers(tmp_path / "b", moved, hot)
    assert [a.response_ids for a in again[::-1]] == [m.response_ids for m in made]
    assert answers(tmp_path / "a", samples(10), hot, seed=1) != made


def test_equal_prompts_are_asked_once(tmp_path):
    twice = [replace(sample, index=i) for i, sample in enumerate([*samples(4), *samples(4)])]
    made = answers(tmp_path, twice, asking(temperature=1.0))
    assert [m.response_ids for m in made[:4]] == [m.response_ids for m in made[4:]]
    [file] = tmp_path.rglob("*.jsonl")
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": teacher_fingerprint(tiny_model(seed=1))},
        {"seed": 1},
        {"answerer": asking(temperature=0.7)},
        {"answerer": asking(limits=AnswerLimits(6, 64, END))},
        {"answerer": asking(end_ids={END, 257})},
    ],
    ids=["teacher", "seed", "temperature", "length", "ends"],
)
def test_what_was_generated_otherwise_is_never_read(tmp_path, capsys, change):
    same = {"teacher": teacher_fingerprint(tiny_model())}
    answers(tmp_path, samples(4), **same)
    capsys.readouterr()
    answers(tmp_path, samples(4), **(same | change))
    assert "the teacher answers 4 of 4 prompts" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shorter_length_limit_cuts_what_is_there(tmp_path):
    made = answers(tmp_path, samples(6))
    cut = answers(tmp_path, samples(6), Never(asking(limits=AnswerLimits(5, 7, END))))
    assert [c.response_ids for c in cut] == [m.response_ids[:3] for m in made]
    assert all(c.truncated for c, m in zip(cut, made, strict=True) if len(m.response_ids) > 3)


@pytest.mark.parametrize(
    "damage", [b'{"prompt": "ab', b"\0" * 40, b'{"prompt": 5}\n', b'{"prompt": "a", "answer": [1, "x"]}\n']
)
def test_a_line_that_is_not_whole_does_not_count_and_spoils_no_other(tmp_path, capsys, damage):
    made = answers(tmp_path, samples(10))
    [file] = tmp_path.rglob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]) + damage)
    capsys.readouterr()
    assert answers(tmp_path, samples(10)) == made
    said = capsys.readouterr().out
    assert f"{file}: 1 damaged line; the answers lost are generated again" in said
    assert "the teacher answers 2 of 10 prompts" in said
    assert answers(tmp_path, samples(10), Never(asking())) == made


def test_a_line_torn_at_any_byte_is_noticed(tmp_path):
    made = answers(tmp_path, samples(3))
    [file] = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(last, len(whole)):
        file.write_bytes(whole[:length])
        assert answers(tmp_path, samples(3), say=lambda _: None) == made


RUN = (
    "from test_references import *\n"
    "print('ready', flush=True)\n"
    "made = answers(folder, many, asking(batch_size=2), say=lambda _: None)\n"
    "print([m.response_ids for m in made])\n"
)


def test_a_process_killed_at_any_time_goes_on_where_it_was(tmp_path):
    counts = []
    for _ in range(2):
        process = python(RUN, tmp_path)
        process.stdout.readline()
        while len(lines := [line for file in tmp_path.rglob("*.jsonl") for line in file.open()]) < 10 + sum(counts):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts.append(len(lines))
    assert len(lines) < 60
    said = output_of(python(RUN, tmp_path)).splitlines()[1]
    assert said == str([m.response_ids for m in answers(tmp_path / "other", samples(60), asking(batch_size=2))])
    [folder] = {file.parent for file in tmp_path.glob("*/answers-0.jsonl")}
    assert set(_read(folder, print)) == {prompt_key(sample) for sample in samples(60)}


def test_a_budget_of_tokens_makes_smaller_batches_of_the_same_answers(tmp_path):
    tight = asking(batch_size=64, batch_tokens=20)  # two prompts of 4 tokens and their answers of 5
    prompts = [sample.prompt_ids for sample in samples(7)]
    assert [len(batch) for batch in tight.batches(prompts)] == [2, 2, 2, 1]
    assert answers(tmp_path / "a", samples(7), tight) == answers(tmp_path / "b", samples(7))


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the teacher's answers .*: Not a directory\. Free some space"):
        answers(tmp_path / "file", samples(3))


def _of_a_rank(folder):
    asked = []

    class Counting(Answerer):
        def __call__(self, prompts, sample_ids, seed):
            asked.extend(prompts)
            return super().__call__(prompts, sample_ids, seed)

    like = asking()
    made = answers(folder, samples(20), Counting(like.engine, LIMITS, like.end_ids, 0.0), say=lambda _: None)
    return ranks.rank(), len(asked), made


@gloo
def test_ranks_share_the_prompts_and_have_all_the_answers(two_ranks, tmp_path):
    want = answers(tmp_path / "alone", samples(20))
    assert two_ranks(_of_a_rank, tmp_path) == [(0, 10, want), (1, 10, want)]
    assert sorted(os.path.basename(path) for path in tmp_path.glob("*/*.jsonl") if "alone" not in str(path)) == [
        "answers-0.jsonl",
        "answers-1.jsonl",
    ]
    assert two_ranks(_of_a_rank, tmp_path) == [(0, 0, want), (1, 0, want)]
