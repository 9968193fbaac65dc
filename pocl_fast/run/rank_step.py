"""The rank step of a run: the measured difficulty, or what else orders the samples, becomes their order and the stages
over them."""

from __future__ import annotations

from pocl_fast.curriculum.blind_signals import signal_lines
from pocl_fast.curriculum.scores import read_scores
from pocl_fast.curriculum.signals import chosen_signals
from pocl_fast.curriculum.stages import control_line, is_measured, make_curriculum, unmeasured_curriculum
from pocl_fast.run.context import RunContext
from pocl_fast.system import ranks


def rank_step(context: RunContext) -> None:
    """Ranks the samples: difficulty.parquet -> curriculum.json, difficulty.png; for a curriculum whose order is not
    measured, the samples themselves -> curriculum.json."""
    if not context.begins("rank", "curriculum.json"):
        return
    if is_measured(context.config.schedule):
        ranks.from_first(lambda: _rank(context))
    else:
        _rank_unmeasured(context)
    if line := control_line(context.config.schedule):
        context.say(f"rank: {line}")


def _rank_unmeasured(context: RunContext) -> None:
    config = context.config
    with context.directory.timed("rank"):
        samples = context.train_set.encoded  # on every rank: the teacher may have to answer first
        curriculum = unmeasured_curriculum(samples, config.schedule, seed=config.optimisation.seed)
        ranks.from_first(lambda: curriculum.save(context.path / "curriculum.json"))
    sizes = ", ".join(f"{stage.size:,}" for stage in curriculum.stages)
    context.say(
        f"rank: {len(samples):,} samples, no difficulty measured; of stage 1 to {len(curriculum.stages)}: {sizes}"
    )


def _rank(context: RunContext) -> None:
    from pocl_fast.reports.difficulty_report import Ranked, difficulty_figure, difficulty_table

    config, path = context.config, context.path
    with context.directory.timed("rank"):
        known = read_scores(path / "difficulty.parquet", chosen_signals(config.difficulty.signals))
        curriculum = make_curriculum(known, config.schedule)
        curriculum.save(path / "curriculum.json")
        hard_first = config.schedule.curriculum == "reverse"
        ranked = Ranked(known, curriculum, config.schedule.rrf_k, config.schedule.ties, hard_first)
        difficulty_figure(ranked).savefig(path / "difficulty.png", dpi=120)
    context.say(difficulty_table(ranked))
    for line in signal_lines(known):
        context.say(f"rank: {line.text}")
