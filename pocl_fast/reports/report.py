"""What a run did, for a person: a table for the terminal and one self-contained HTML page.

Knows the files of a run directory. Does not know how the steps made them.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pocl_fast import __version__
from pocl_fast.curriculum.stages import control_line
from pocl_fast.cutting.layer_choice import RECORD as LAYERS
from pocl_fast.cutting.layer_choice import ranges
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.inspection.of_run import lengths_part, samples_part
from pocl_fast.inspection.page import style
from pocl_fast.reports.difficulty_report import difficulty_notes, read_ranked, sample_rows, stage_rows
from pocl_fast.reports.score_tables import changed_answers, score_tables, text_lines
from pocl_fast.settings.configuration import recorded_config
from pocl_fast.system.console import duration
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.state import goodness

CE_COLOUR, DIVERGENCE_COLOUR, SCORE_COLOUR = "#1f5fa8", "#d1603d", "#3a7d44"


@dataclass(frozen=True)
class StepRow:
    """What a step took, as text."""

    name: str
    time: str
    memory: str


def write_report(run: Path, encoder: SampleEncoder | None = None) -> Path:
    """Writes report.html from what the run directory holds so far, and leaves out sections without data. Its path.
    `encoder` is the run's, where it is loaded already."""
    if not (run / "steps.json").exists():
        raise InputError(f"{run} holds no run; make one with `pocl-fast distill`")
    stamps = _json(run / "steps.json")
    page = Environment(
        loader=PackageLoader("pocl_fast.reports", "."), autoescape=select_autoescape(default=True)
    ).get_template("report.jinja")
    text = page.render(
        version=__version__,
        name=run.name,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        kind="Fine-tuning" if "sft" in stamps else "Distillation",
        layers=_layers(run),
        warmup=warmup_line(stamps),
        results=score_tables(run),
        steps=step_rows(stamps),
        stages=(stages := _stages(run)),
        stages_note=_stages_note(run),
        compares=_compares(run, stages),
        training_curve=_picture(training_figure(run)),
        **_difficulty(run),
        **_samples(run, stamps, encoder),
        changed=changed_answers(run),
    )
    write_text(run / "report.html", text)
    return run / "report.html"


def summary_table(run: Path) -> str:
    """The run in a few lines for the terminal: each set's scores, each step's time and memory, the speed of training,
    the report's path."""
    stamps = _json(run / "steps.json")
    lines = text_lines(run)
    lines += [line, ""] if (line := warmup_line(stamps)) else []
    lines.append(f"{'step':<28}{'time':>17}{'peak memory':>17}")
    lines += [f"{row.name:<28}{row.time:>17}{row.memory:>17}" for row in step_rows(stamps)]
    trained = stamps.get("train") or stamps.get("sft") or {}
    if "tokens_per_second" in trained:
        lines.append("")
        lines.append(f"training speed: {trained['tokens_per_second']:,.0f} tokens/s")
    lines.append(f"report: {run / 'report.html'}")
    return "\n".join(lines)


def warmup_line(stamps: dict[str, Any]) -> str:
    """What a run's warm-up was, in words; empty without one, and before it is done."""
    known = stamps.get("warmup", {})
    if not known.get("done"):
        return ""
    losses = " to ".join(f"{loss:.3f}" for loss in known["losses"])
    steps = f"{known['steps']:,} step" + ("" if known["steps"] == 1 else "s")
    made = f"warm-up: {steps} of supervised fine-tuning on {known['samples']:,} training samples"
    return f"{made}, whose cross-entropy went from {losses} nats a token" if losses else made


def _layers(run: Path) -> str:
    """Which layers a cut student has, in words; empty where it was not cut, or not yet."""
    known = _json(run / LAYERS)
    if not known:
        return ""
    return f"The student has {len(known['layers'])} of {known['made_from']['of']} layers: {ranges(known['layers'])}"


def step_rows(stamps: dict[str, Any]) -> list[StepRow]:
    """A row for each finished step, and one for all of them: their time together, and the largest peak of memory."""
    done = {name: stamp for name, stamp in stamps.items() if stamp["done"]}
    rows = [StepRow(name, duration(stamp["seconds"]), _gib(stamp["peak_bytes"])) for name, stamp in done.items()]
    if done:
        seconds, peak = sum(s["seconds"] for s in done.values()), max(s["peak_bytes"] for s in done.values())
        rows.append(StepRow("in all", duration(seconds), _gib(peak)))
    return rows


def training_figure(run: Path) -> Any:
    """The loss and the held-out ROUGE-L over the steps of all stages; None before training."""
    if not (run / "metrics.jsonl").exists():
        return None
    records = read_metrics(run / "metrics.jsonl")
    last = {r["stage"]: r["step"] for r in records}
    begins = {stage: max((n for s, n in last.items() if s < stage), default=0) for stage in last}
    figure, (left, right) = _axes(2)
    _draw_losses(left, [r for r in records if "ce" in r])  # a log of skipped steps alone has none
    _draw_scores(right, [r for r in records if "eval_rouge_l" in r])
    for axis in (left, right):
        for stage in sorted(begins):
            axis.axvline(begins[stage], color="#999", lw=0.8, ls=":")
            place = (begins[stage], 0.02)
            axis.annotate(f" stage {stage + 1}", place, xycoords=("data", "axes fraction"), fontsize=8, color="#666")
        axis.legend(frameon=False)
    return figure


def _draw_losses(axis: Any, steps: list[dict[str, Any]]) -> None:
    places = [r["step"] for r in steps]
    label = "divergence to the teacher, at the stage's temperature"
    axis.plot(places, [r["ce"] for r in steps], color=CE_COLOUR, label="cross-entropy of the references", lw=1.4)
    if any("divergence" in r for r in steps):  # supervised fine-tuning has none
        axis.plot(places, [r["divergence"] for r in steps], color=DIVERGENCE_COLOUR, label=label, lw=1.4)
    axis.set(xlabel="optimizer step", ylabel="nats a token", title="Training batches")


def _draw_scores(axis: Any, evaluations: list[dict[str, Any]]) -> None:
    scores = [r["eval_rouge_l"] for r in evaluations]
    axis.plot([r["step"] for r in evaluations], scores, "o-", color=SCORE_COLOUR, label="greedy answers")
    axis.set(xlabel="optimizer step", ylabel="ROUGE-L, 0 to 100", title="Held-out samples after each pass")
    axis.set(ylim=(0, max(1.0, 1.1 * max(scores, default=0.0))))


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _picture(figure: Any) -> str | None:
    """A figure as PNG in base64."""
    if figure is None:
        return None
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return base64.b64encode(data.getvalue()).decode()


def _difficulty(run: Path) -> dict[str, Any]:
    """The page's section on difficulty: the picture, the stages and three samples of each; empty before ranking."""
    ranked = read_ranked(run)
    if ranked is None:
        return {}
    ends = ("hardest", "easiest") if ranked.hard_first else ("easiest", "hardest")
    return {
        "difficulty": base64.b64encode((run / "difficulty.png").read_bytes()).decode(),
        "signals": [one.signal.name for one in ranked.known.signals],
        "three_samples": ", the middle and the ".join(ends),
        "difficulty_notes": difficulty_notes(ranked),
        "difficulty_stages": stage_rows(ranked),
        "difficulty_samples": sample_rows(ranked, run / "difficulty.parquet"),
    }


def _samples(run: Path, stamps: dict[str, Any], encoder: SampleEncoder | None) -> dict[str, Any]:
    """The page's sections on the training samples: three of them as the model sees them, and the lengths of all."""
    samples, why_none = samples_part(run, recorded_config(run), stamps, encoder)
    pictures, limits = lengths_part(stamps)
    return {
        "style": style(),
        "samples": samples,
        "why_no_samples": why_none,
        "length_pictures": pictures,
        "length_lines": limits,
    }


def _stages(run: Path) -> list[dict[str, Any]]:
    """A row for each stage: its samples and settings, and the scores of its best evaluation."""
    path = run / "curriculum.json"
    if not path.exists():
        return []
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    rows = []
    for stage in _json(path)["stages"]:
        evaluations = [r for r in records if r["stage"] == stage["index"] and "eval_rouge_l" in r]
        best = max(evaluations, key=_goodness, default={})
        rows.append({**stage, "rouge_l": best.get("eval_rouge_l"), "cross_entropy": best.get("eval_cross_entropy")})
    return rows


def _stages_note(run: Path) -> str:
    """Which samples the stages have, in words."""
    usual = "Each stage trains on the easiest samples, more of them than the one before"
    if recorded_config(run).schedule.stages == 1:
        usual = "The one stage trains on all samples"
    return (control_line(recorded_config(run).schedule) or usual) + "."


def _compares(run: Path, stages: list[dict[str, Any]]) -> bool:
    """Whether some step's loss compares the student with a teacher."""
    return recorded_config(run).rollouts.rollouts != "none" or any(stage["alpha"] < 1 for stage in stages)


def _goodness(evaluation: dict[str, Any]) -> tuple[float, float, int]:
    """What training chooses a stage's best weights by: of equal scores the lower cross-entropy, then the later step."""
    return *goodness(evaluation["eval_rouge_l"], evaluation["eval_cross_entropy"]), evaluation["step"]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
