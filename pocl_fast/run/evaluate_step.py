"""The evaluate step of a run: the student's answers to the held-out samples, and their scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pocl_fast.answers import evaluation
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.run.context import RunContext
from pocl_fast.run.directory import WRITES
from pocl_fast.system import ranks
from pocl_fast.system.files import write_json, write_text

When = Literal["before", "warmed", "after"]


def evaluate_step(context: RunContext, when: When) -> None:
    """Evaluates the student "before" training, as it was given, "warmed" up, or "after" -> evaluation.json,
    answers-*.jsonl."""
    step = f"evaluate-{when}"
    if not context.begins(step, "evaluation.json"):
        return
    dev = context.dev_set
    with context.directory.timed(step):
        load = {"before": context.given_student, "warmed": context.student, "after": context.trained_student}
        student = load[when]()
        with context.precision.autocast(), context.engine(student.model) as engine:
            scores, answers = evaluation.evaluate(
                student.model,
                dev.samples,
                dev.encoded,
                context.encoder,
                engine=engine,
                seeds=context.config.evaluation.eval_seeds,
                max_new_tokens=context.config.generation.max_new_tokens,
                packed=student.packed,
                rouge_tokenizer=context.config.generation.rouge_tokenizer,
                name=step,
            )
        if ranks.is_first():
            known = context.path / "evaluation.json"
            results = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
            write_json(known, results | {when: scores.to_dict()})
            save_answers(context.path / WRITES[step][0], dev, answers)
    seeds = len(scores.seeds)
    spread = f"mean and spread over {seeds} seeds" if seeds > 1 else "of one seed"
    context.say(
        f"{step}: {scores.samples:,} held-out samples, ROUGE-L {scores.rouge_l:.2f} ± {scores.rouge_l_spread:.2f}"
        f" of 100 ({spread}), exact match {scores.exact_match:.1f} %,"
        f" cross-entropy {scores.cross_entropy:.3f} nats a token"
    )


def save_answers(path: Path, dev: SampleSet, answers: Sequence[str]) -> None:
    """Writes a line of JSON a sample: its line in --dev, its prompt and references, and the student's answer."""
    lines = []
    for one, answer in zip(dev.encoded, answers, strict=True):
        sample = dev.samples[one.index]
        prompt = sample.messages[-1]["content"]
        record = {"line": sample.line, "prompt": prompt, "references": sample.references, "answer": answer}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
