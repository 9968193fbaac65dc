"""What a run did, for a person: a table for the terminal and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pocl_fast import __version__
from pocl_fast.run.difficulty_report import COLOURS, read_ranked, stage_rows, stage_samples
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text
from pocl_fast.training.metrics import read_metrics


def write_report(run: Path) -> Path:
    """Writes `report.html` from what the run directory holds so far; sections without data are left out."""
    if not (run / "steps.json").exists():
        raise InputError(f"{run} holds no run; make one with `pocl-fast distill`")
    stamps = _json(run / "steps.json")
    page = Environment(
        loader=PackageLoader("pocl_fast.run", "."), autoescape=select_autoescape(default=True)
    ).get_template("report.jinja")
    text = page.render(
        version=__version__,
        name=run.name,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        results=result_rows(run),
        steps=step_rows(stamps),
        stages=_stages(run),
        training_curve=_picture(training_figure(run)),
        **_difficulty(run),
        answers=_answers(run),
    )
    write_text(run / "report.html", text)
    return run / "report.html"


def summary_table(run: Path) -> str:
    """The run in a few lines for the terminal: scores before and after, speed, memory, time of each step, the report's
    path."""
    stamps = _json(run / "steps.json")
    lines = [f"{'held-out':<28}{'before':>14}{'after':>14}"]
    for row in result_rows(run):
        lines.append(f"{row['name']:<28}{row['before']:>14}{row['after']:>14}")
    lines.append("")
    lines.append(f"{'step':<28}{'time':>14}{'peak memory':>14}")
    for row in step_rows(stamps):
        lines.append(f"{row['name']:<28}{row['time']:>14}{row['memory']:>14}")
    if "tokens_per_second" in stamps.get("train", {}):
        lines.append("")
        lines.append(f"training speed: {stamps['train']['tokens_per_second']:,.0f} tokens/s")
    lines.append(f"report: {run / 'report.html'}")
    return "\n".join(lines)


def result_rows(run: Path) -> list[dict[str, str]]:
    """Held-out scores before and after training, as text; a dash where not evaluated yet."""
    results = _json(run / "evaluation.json")

    def cell(when: str, key: str, form: str, spread: str | None = None) -> str:
        if when not in results:
            return "-"
        scores = results[when]
        return form.format(scores[key]) + (f" ± {scores[spread]:.2f}" if spread else "")

    names = [
        ("ROUGE-L", "rouge_l", "{:.2f}", "rouge_l_spread"),
        ("exact match, %", "exact_match", "{:.1f}", None),
        ("loss (CE, nats a token)", "cross_entropy", "{:.3f}", None),
    ]
    return [{"name": n, "before": cell("before", k, f, s), "after": cell("after", k, f, s)} for n, k, f, s in names]


def step_rows(stamps: dict[str, Any]) -> list[dict[str, str]]:
    """Each finished step's time and peak memory, and the whole's."""
    done = {name: stamp for name, stamp in stamps.items() if stamp["done"]}
    rows = [{"name": n, "time": _time(s["seconds"]), "memory": _gib(s["peak_bytes"])} for n, s in done.items()]
    if done:
        total = sum(s["seconds"] for s in done.values())
        rows.append(
            {"name": "in all", "time": _time(total), "memory": _gib(max(s["peak_bytes"] for s in done.values()))}
        )
    return rows


def training_figure(run: Path) -> Any:
    """Loss, and dev ROUGE-L, over the steps of all stages; None before training."""
    if not (run / "metrics.jsonl").exists():
        return None
    records = read_metrics(run / "metrics.jsonl")
    last = {r["stage"]: r["step"] for r in records}
    begins = {stage: max((n for s, n in last.items() if s < stage), default=0) for stage in last}
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_rouge_l" in r]
    figure, (left, right) = _axes(2)
    for name, label, colour in (
        ("ce", "cross-entropy", COLOURS[0]),
        ("divergence", "divergence to the teacher", COLOURS[1]),
    ):
        left.plot([r["step"] for r in steps], [r[name] for r in steps], color=colour, label=label, lw=1.4)
    left.set(xlabel="step", ylabel="nats a token", title="Training")
    places = [r["step"] for r in evaluations]
    right.plot(places, [r["eval_rouge_l"] for r in evaluations], "o-", color=COLOURS[2], label="dev ROUGE-L, greedy")
    right.set(xlabel="step", ylabel="ROUGE-L", title="Held-out samples at each epoch's end")
    for axis in (left, right):
        for stage in sorted(begins):
            axis.axvline(begins[stage], color="#999", lw=0.8, ls=":")
            axis.annotate(
                f" stage {stage + 1}",
                (begins[stage], 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                color="#666",
            )
        axis.legend(frameon=False)
    return figure


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
    """The picture, the table of stages and three samples of each; nothing before ranking."""
    ranked = read_ranked(run)
    if ranked is None:
        return {}
    return {
        "difficulty": base64.b64encode((run / "difficulty.png").read_bytes()).decode(),
        "signals": [one.signal.name for one in ranked.known.signals],
        "difficulty_stages": stage_rows(ranked),
        "difficulty_samples": stage_samples(ranked, run / "difficulty.parquet"),
    }


def _stages(run: Path) -> list[dict[str, Any]]:
    """One row a stage: its samples and settings, and its last evaluation."""
    path = run / "curriculum.json"
    if not path.exists():
        return []
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    rows = []
    for stage in _json(path)["stages"]:
        evaluations = [r for r in records if r["stage"] == stage["index"] and "eval_rouge_l" in r]
        best = max(evaluations, key=lambda r: r["eval_rouge_l"], default={})
        rows.append({**stage, "rouge_l": best.get("eval_rouge_l"), "cross_entropy": best.get("eval_cross_entropy")})
    return rows


def _answers(run: Path, count: int = 8) -> list[dict[str, str]]:
    """Answers to the same prompts before and after, spread over the held-out set."""
    paths = [run / f"answers-{when}.jsonl" for when in ("before", "after")]
    if not all(path.exists() for path in paths):
        return []
    before, after = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths)
    picked = range(0, len(before), max(1, len(before) // count))
    return [
        {
            "prompt": before[i]["prompt"],
            "reference": before[i]["references"][0],
            "before": before[i]["answer"],
            "after": after[i]["answer"],
        }
        for i in list(picked)[:count]
    ]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
