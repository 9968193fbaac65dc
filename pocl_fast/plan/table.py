"""A plan as text of at most 100 columns. Computes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from pocl_fast.inspection.length_pictures import as_text
from pocl_fast.plan.data_plan import NAMES, DataPlan
from pocl_fast.plan.disk import DiskPlan
from pocl_fast.plan.plan import MemoryPlan, Plan
from pocl_fast.plan.shapes import ModelPlan
from pocl_fast.plan.step_plan import StepPlan
from pocl_fast.plan.timing import StepTime
from pocl_fast.plan.warmup import WarmupPlan
from pocl_fast.system.console import duration, size

WIDTH = 100
NAME = 44  # characters of the names before values


def plan_table(plan: Plan) -> str:
    """All parts that the plan has, and its notes."""
    parts = [_data(name, data) for name, data in plan.data.items()]
    if plan.warmup is not None:
        parts.append(_warmup(plan.warmup))
    if plan.steps is not None:
        parts.append(_steps(plan.steps))
    if plan.models:
        parts.append(_models(plan.models))
    if plan.disk is not None:
        parts.append(_disk(plan.disk))
    if plan.memory is not None:
        parts.append(_memory(plan.memory))
    if plan.times is not None:
        parts.append(_times(plan.times))
    if plan.notes:
        parts.append("\n".join(["Notes", *(_wrapped(note) for note in plan.notes)]))
    return "\n\n".join(parts)


def _data(name: str, data: DataPlan) -> str:
    counts: list[tuple[str, Any]] = [("records", data.records), *_parts(data.report)]
    histograms: list[str] = []
    if (lengths := data.lengths) is not None:
        by_option = (
            ("--max-prompt-length", "prompts", lengths.prompts, lengths.by_prompt_limit),
            ("--max-length", "prompts with answers", lengths.samples, lengths.by_length_limit),
        )
        for option, what, one, lost in by_option:
            if lost.samples:
                counts.append((f"lost to {option} {one.limit}", f"{some(lost.tokens, 'token')} of {lost.samples:,}"))
            histograms += ["", f"  {'tokens':>15} {what}", *(f"  {row}" for row in as_text(one, option))]
    if data.held_out:
        counts.append(("held out to evaluate with", data.held_out))
    counts.append(("samples", data.samples))
    counts += [("tokens", data.tokens), ("supervised tokens", data.supervised_tokens)]
    lines = [_headed(f"Data: {name}, ", data.name), *_pairs(counts), "", *_quantiles(data), *histograms]
    return "\n".join(lines)


def _parts(report: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in report.items():
        said = NAMES[name]
        if isinstance(value, dict):
            found += [(f"{said}: {key}" if said else key, count) for key, count in value.items()]
        else:
            found.append((said, value))
    return found


def _quantiles(data: DataPlan) -> list[str]:
    names = {"0": "shortest", "50": "median", "100": "longest"}
    rows = [("tokens of", [names.get(percent, f"{percent} %") for percent in data.answers])]
    known = {"trained on": data.answers}
    if data.lengths is not None:
        whole = {"prompts": data.lengths.prompts, "prompts with answers": data.lengths.samples}
        known = {name: one.quantiles for name, one in whole.items()} | known
    rows += [(name, [f"{length:,}" for length in one.values()]) for name, one in known.items()]
    return [f"  {name:<20}" + "".join(f"{value:>10}" for value in values) for name, values in rows]


def _warmup(warmup: WarmupPlan) -> str:
    pairs = [
        ("samples", warmup.samples),
        ("passes", f"{warmup.passes:g}"),
        ("optimizer steps", warmup.steps),
        ("tokens in all passes", warmup.tokens),
        ("learning rate, at its peak", f"{warmup.learning_rate:g}"),
    ]
    return "\n".join(["Warm-up (supervised fine-tuning, before the student is measured)", *_pairs(pairs)])


def _steps(steps: StepPlan) -> str:
    lines = ["Steps", "  stage     samples    passes       steps   temperature     alpha"]
    for one in steps.stages:
        lines.append(
            f"  {one.stage:<6}{one.samples:>11,}{one.passes:>10g}{one.steps:>12,}{one.temperature:>14g}{one.alpha:>10g}"
        )
    step = f"{steps.tokens_a_step:,}"
    if steps.accumulation > 1:
        step += f" of {steps.accumulation} micro-batches"
    pairs = [
        ("optimizer steps", f"{steps.steps:,} ({steps.note})"),
        ("evaluations in training", steps.evaluations),
        ("tokens in all passes", steps.tokens),
        ("tokens a step", step),
        ("tokens of a micro-batch", f"{steps.batch_tokens:,} typical, {steps.largest_batch_tokens:,} largest"),
    ]
    return "\n".join([*lines, "", *_pairs(pairs)])


def _models(models: dict[str, ModelPlan]) -> str:
    rows: list[tuple[str, list[str]]] = [("", list(models))]
    values = list(models.values())
    rows.append(("family", [one.family for one in values]))
    rows.append(("parameters", [f"{one.parameters:,}" for one in values]))
    rows.append(("trained weights", [f"{one.trained:,}" for one in values]))
    rows.append(("layers", [f"{one.layers:,}" for one in values]))
    rows.append(("hidden size", [f"{one.hidden_size:,}" for one in values]))
    rows.append(("vocabulary rows", [f"{one.vocabulary_rows:,}" for one in values]))
    heads = [f"{one.lm_head_parameters:,}" + (", tied" if one.tied else "") for one in values]
    rows.append(("weights of the lm_head", heads))
    return "\n".join(["Models", *(f"  {name:<32}" + "".join(f"{v:>26}" for v in row) for name, row in rows)])


def _disk(disk: DiskPlan) -> str:
    pairs: list[tuple[str, Any]] = []
    if disk.cache is not None:
        pairs.append((f"teacher's cache ({disk.cache_entries})", size(disk.cache)))
    if disk.checkpoint is not None:
        pairs.append(("checkpoints at a time", f"{disk.checkpoints} of {size(disk.checkpoint)}"))
        pairs.append(("best weights of the stages, at most", size(disk.best_weights or 0)))
        if disk.warmed is not None:
            pairs.append(("the warmed-up student", size(disk.warmed)))
        how = "" if disk.saved == "whole" else f" ({disk.saved})"
        pairs.append((f"the student{how}", size(disk.student or 0)))
    pairs.append(("in all, at most", size(disk.peak)))
    pairs.append(("free on its disk", size(disk.free)))
    warning = [] if disk.fits else [f"  WARNING: it does not fit on the disk of {disk.place}"]
    return "\n".join(["Disk", *_pairs(pairs), *warning])


def _memory(memory: MemoryPlan) -> str:
    lines = [f"Memory, an estimate of each step's peak ({memory.of}: {size(memory.free)} free)"]
    for step in memory.steps:
        lines.append(f"  {step.step:<38}{size(step.total):>12}")
        lines += [f"      {name:<46}{size(count):>12}" for name, count in step.parts.items()]
    warning = [] if memory.fits else [f"  WARNING: it does not fit into {memory.of}"]
    return "\n".join([*lines, *warning])


def _times(times: Sequence[StepTime]) -> str:
    lines = ["Time, from steps that were timed here"]
    lines += [f"  {one.step:<28}{duration(one.seconds):>11}   {one.timed}"[:WIDTH] for one in times]
    return "\n".join([*lines, f"  {'in all':<28}{duration(sum(one.seconds for one in times)):>11}"])


def _pairs(pairs: Sequence[tuple[str, Any]]) -> list[str]:
    """A line a name and its value; a long name has more lines, with the value on the last."""
    lines: list[str] = []
    for name, value in pairs:
        *first, last = textwrap.wrap(name, NAME, subsequent_indent="  ", break_on_hyphens=False)
        lines += [f"  {part}" for part in first]
        lines.append(f"  {last:<{NAME}} {value:,}" if isinstance(value, int) else f"  {last:<{NAME}} {value}")
    return lines


def some(count: int, noun: str) -> str:
    """ "1 sample", "2,000 samples"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _headed(words: str, name: str) -> str:
    """The words and a name, of which one that is too long loses its beginning."""
    room = WIDTH - len(words)
    return words + (name if len(name) <= room else f"…{name[-room + 1 :]}")


def _wrapped(note: str) -> str:
    return textwrap.fill(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
