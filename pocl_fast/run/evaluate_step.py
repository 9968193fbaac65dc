"""The evaluate steps of a run: answers to the samples of each set, and their scores."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Literal

from pocl_fast.answers import evaluation
from pocl_fast.answers.engine import Engine, TorchEngine
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.answers.sample_scores import Asked, SampleScores, Scores, read_scores, score_file, write_scores
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.run.checks import check_teacher_reads_sets
from pocl_fast.run.context import RunContext
from pocl_fast.run.scored_sets import ScoredSet
from pocl_fast.run_directory.evaluation_file import EVALUATION, content_of, record
from pocl_fast.system import ranks
from pocl_fast.teacher.loading import WITH_STUDENT

When = Literal["before", "warmed", "after", "teacher"]


def evaluate_step(context: RunContext, when: When) -> None:
    """Scores the student "before" training, as it was given, "warmed" up, or "after", or the "teacher" ->
    evaluation.json, scores/NAME-WHEN.parquet. The teacher is passed over where the options have none to score."""
    step = f"evaluate-{when}"
    if when == "teacher" and not context.scores_teacher:
        return
    if not context.begins(step, EVALUATION):
        return
    sets = context.evaluation_sets
    check_teacher_reads_sets(context)
    if context.train_file_is_loaded:
        context.say_same_samples()
    with context.directory.timed(step):
        teacher = replace(context.scoring_teacher(), kept=context.teacher_states) if context.scores_teacher else None
        model, compared = _models(context, when, teacher)
        with context.precision.autocast(), _engine(context, when, model) as engine:
            found = [_scored(context, when, one, engine, model, compared) for one in sets]
        summaries = [scores.summary() for scores in found]
        chooses = ranks.from_first(lambda: _record(context, when, summaries))
    if line := context.teacher_states.lacking():
        context.say(f"teacher: {line}")
    for one, scores, chosen_by in zip(sets, summaries, chooses, strict=True):
        context.say(f"{step}: {one.described(chooses=chosen_by)}: {describe(scores)}")


def _models(context: RunContext, when: When, teacher: LoadedModel | None) -> tuple[LoadedModel, LoadedModel | None]:
    """The model that is scored, and the teacher that it is compared with."""
    if when == "teacher":
        assert teacher is not None  # else the step is passed over
        return teacher, None
    load = {"before": context.given_student, "warmed": context.student, "after": context.trained_student}
    return load[when](), teacher


def _engine(context: RunContext, when: When, model: LoadedModel) -> contextlib.AbstractContextManager[Engine]:
    """What generates the answers. A teacher that is quantised, or lies elsewhere than the student, is not for vLLM."""
    chosen = context.config.models
    if when == "teacher" and (chosen.teacher_quantization != "none" or chosen.teacher_device != WITH_STUDENT):
        return contextlib.nullcontext(TorchEngine.of(model.model, context.encoder, context.config.generation))
    return context.engine(model.model)


def _scored(
    context: RunContext, when: When, one: ScoredSet, engine: Engine, model: LoadedModel, teacher: LoadedModel | None
) -> SampleScores:
    """The scores on a set; those that an interrupted step has left, where there are such."""
    path = score_file(context.path, one.named.name, when)
    if ranks.from_first(path.exists):
        return ranks.from_first(lambda: read_scores(path))
    scores = evaluation.evaluate(
        model,
        one.data,
        context.encoder,
        engine=engine,
        seeds=context.config.evaluation.eval_seeds,
        max_new_tokens=context.config.generation.max_new_tokens,
        rouge_tokenizer=context.config.generation.rouge_tokenizer,
        teacher=teacher,
        name=f"evaluate-{when} {one.named.name}",
    )
    ranks.from_first(lambda: write_scores(path, asked_of(one.data), scores))
    return scores


def _record(context: RunContext, when: When, summaries: list[Scores]) -> list[bool]:
    """Writes evaluation.json; which of the sets choose weights."""
    directory, config = context.directory, context.config
    chooses, found = [], {}
    for one, scores in zip(context.evaluation_sets, summaries, strict=True):
        chooses.append(directory.chooses_weights(f"evaluate-{when}", one.named, config))
        found[one.named.name] = {
            "role": one.named.role,
            "chooses_weights": chooses[-1],
            "source": one.source,
            "samples": len(one.data.encoded),
            "fingerprint": content_of(one.data),
            "scores": scores.to_dict(),
        }
    record(context.path, when, found)
    return chooses


def asked_of(data: SampleSet) -> list[Asked]:
    """What the samples of a set ask."""
    samples = [data.samples[one.index] for one in data.encoded]
    return [Asked(sample.line, sample.messages[-1]["content"], sample.references) for sample in samples]


def describe(scores: Scores) -> str:
    """Scores in one line."""
    seeds = len(scores.seeds)
    spread = f" ± {scores.rouge_l_spread:.2f}" if seeds > 1 else ""
    of = f"mean and spread over {seeds} seeds" if seeds > 1 else "one seed: no spread over seeds"
    if scores.rouge_l_interval is not None:
        low, high = scores.rouge_l_interval
        of += f"; 95 % interval over samples {low:.2f} to {high:.2f}"
    parts = [
        f"ROUGE-L {scores.rouge_l:.2f}{spread} of 100 ({of})",
        f"exact match {scores.exact_match:.1f} %",
        f"cross-entropy {scores.cross_entropy:.3f} nats a token",
    ]
    if scores.mean_kl is not None:
        parts.append(f"KL(teacher || student) {scores.mean_kl:.3f}")
    return ", ".join(parts)
