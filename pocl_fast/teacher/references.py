"""Sequence-level distillation (Kim and Rush, arXiv 1606.07947): the teacher's answers in the place of the references,
generated once and kept as JSON Lines.

Knows files and what an answer depends on. Does not know how answers are generated.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pocl_fast.answers.answerer import Answerer, answered
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system import console, ranks
from pocl_fast.system.console import shared_progress
from pocl_fast.system.errors import InputError


def teacher_answers(
    samples: Sequence[EncodedSample],
    folder: str | Path,
    answerer: Answerer,
    *,
    teacher: str,
    seed: int = 0,
    say: Callable[[str], object] = console.say,
) -> list[EncodedSample]:
    """The samples with the teacher's answers as their responses. Answers that are not in the folder are generated and
    written batch by batch, so that a killed run resumes after its last batch.

    `teacher` identifies the teacher (`teacher_fingerprint`). An answer is found by it, the answerer's settings, the
    seed and the prompt's tokens, and no other is read; equal prompts have one answer. The ranks share the work, and
    each must call it. Raises `InputError` where the folder cannot be read or written.
    """
    made_from = json.dumps([teacher, answerer.settings, seed], sort_keys=True)
    folder = Path(folder) / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    prompts = {prompt_key(sample): sample.prompt_ids for sample in samples}
    missing = ranks.from_first(lambda: sorted(set(prompts) - set(_read(folder, say))))
    if missing:
        if ranks.is_first():
            say(f"the teacher answers {len(missing)} of {len(prompts)} prompts, kept in {folder}")
        mine = [missing[i] for i in ranks.share([len(prompts[key]) for key in missing])]
        with shared_progress(len(missing), "teacher's answers", "prompts") as done:
            _generate(mine, prompts, folder, answerer, seed, done)
        ranks.barrier()
    known = _read(folder, lambda _: None)
    if lost := set(prompts) - set(known):
        raise InputError(f"{len(lost)} answers that were written to {folder} are not in it: look at the disk")
    return [answered(sample, known[prompt_key(sample)], answerer.limits) for sample in samples]


def prompt_key(sample: EncodedSample) -> str:
    """32 hexadecimal digits that identify a prompt's tokens."""
    return hashlib.sha256(array("q", sample.prompt_ids).tobytes()).hexdigest()[:32]


def _generate(
    keys: Sequence[str],
    prompts: Mapping[str, Sequence[int]],
    folder: Path,
    answerer: Answerer,
    seed: int,
    done: Callable[[int], object],
) -> None:
    path = folder / f"answers-{ranks.rank()}.jsonl"
    for batch in answerer.batches([prompts[key] for key in keys]):
        asked = [keys[i] for i in batch]
        streams = [int(key[:15], 16) for key in asked]  # of the prompt alone, wherever its sample stands
        answers = answerer([prompts[key] for key in asked], streams, seed)
        lines = [json.dumps({"prompt": key, "answer": list(a)}) for key, a in zip(asked, answers, strict=True)]
        _append(path, lines)
        done(len(batch) * ranks.world_size())  # the others are about as far


def _append(path: Path, lines: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                torn = file.read() != b"\n"  # of a process that was killed: never a whole JSON object
            else:
                torn = False
            file.write(b"\n" * torn + "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise InputError(
            f"cannot write the teacher's answers {path}: {error.strerror}. Free some space and run the command again;"
            " what was written before is kept"
        ) from error


def _read(folder: Path, say: Callable[[str], object]) -> dict[str, list[int]]:
    """The answers of all whole lines, by prompt."""
    known: dict[str, list[int]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"cannot read the teacher's answers {path}: {error.strerror}") from error
        damaged = 0
        for line in lines:
            if not line:
                continue
            try:
                record = json.loads(line)
                known[str(record["prompt"])] = [int(token) for token in record["answer"]]
            except (ValueError, TypeError, KeyError):
                damaged += 1
        if damaged:
            say(f"{path}: {damaged} damaged line{'s' * (damaged > 1)}; the answers lost are generated again")
    return known
