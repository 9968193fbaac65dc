"""Draws docs/images/demo.png out of the run directory that `make demo` leaves.

python docs/images/demo_picture.py runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY = "#1f5fa8", "#d1603d", "#3a7d44", "#666666"


def main(run: Path) -> None:
    stages = json.loads((run / "curriculum.json").read_text(encoding="utf-8"))["stages"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [max(r["step"] for r in records if r["stage"] == stage["index"]) for stage in stages]
    begins = [0, *ends[:-1]]
    losses = [r for r in records if "ce" in r]
    evaluations = [r for r in records if "eval_rouge_l" in r]

    figure = Figure(figsize=(12.5, 3.6), layout="constrained")
    plan, loss, score = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    plan.set(title="What is trained: the easiest samples first", ylabel="samples in the stage")
    plan.set(xlim=(0, ends[-1]), ylim=(0, 1.3 * stages[-1]["size"]))
    for stage, begin, end in zip(stages, begins, ends, strict=True):
        plan.fill_between([begin, end], stage["size"], color=BLUE, alpha=0.25 + 0.15 * stage["index"], lw=0)
        settings = f"stage {stage['index'] + 1}\ntemperature {stage['temperature']:g}\nCE × {stage['alpha']:g}"
        plan.text((begin + end) / 2, 1.02 * stage["size"], settings, ha="center", va="bottom", fontsize=7.5, color=GREY)
    loss.set(title="Loss of the student", ylabel="nats a token")
    for name, label, colour in (("ce", "cross-entropy (CE)", BLUE), ("divergence", "divergence from teacher", RED)):
        loss.plot([r["step"] for r in losses], [r[name] for r in losses], color=colour, lw=1.6, label=label)
    loss.legend(frameon=False)
    score.set(title="Answers to 120 held-out prompts", ylabel="ROUGE-L, greedy answers")
    steps, scores = [r["step"] for r in evaluations], [r["eval_rouge_l"] for r in evaluations]
    score.set(xlim=(0, 1.03 * ends[-1]), ylim=(0, 1.15 * max(scores)))
    score.plot(steps, scores, "o-", color=GREEN, lw=1.6)
    for axis in (plan, loss, score):
        axis.set_xlabel("optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        for end in ends[:-1]:
            axis.axvline(end, color=GREY, lw=0.6, ls=":")
    figure.savefig(Path(__file__).with_name("demo.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
