"""The rank step of a run: the measured difficulty becomes the order of the samples and the stages over them."""

from __future__ import annotations

from pocl_fast.curriculum.blind_signals import signal_lines
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import make_curriculum
from pocl_fast.run.context import RunContext
from pocl_fast.system import ranks


def rank_step(context: RunContext) -> None:
    """Ranks the samples: difficulty.parquet -> curriculum.json, difficulty.png."""
    if context.begins("rank", "curriculum.json"):
        ranks.from_first(lambda: _rank(context))


def _rank(context: RunContext) -> None:
    from pocl_fast.reports.difficulty_report import Ranked, difficulty_figure, difficulty_table

    config, path = context.config, context.path
    with context.directory.timed("rank"):
        known = read_scores(path / "difficulty.parquet", chosen_signals(config.difficulty.signals))
        curriculum = make_curriculum(known, config.schedule)
        curriculum.save(path / "curriculum.json")
        ranked = Ranked(known, curriculum, config.schedule.rrf_k, config.schedule.ties)
        difficulty_figure(ranked).savefig(path / "difficulty.png", dpi=120)
    context.say(difficulty_table(ranked))
    for line in signal_lines(known):
        context.say(f"rank: {line.text}")
