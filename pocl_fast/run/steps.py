"""The steps of a run in their order: warm up, measure, evaluate student and teacher, rank, train, evaluate again,
report; or fine-tune.

Each step reads and writes files in the run directory, so that the same command resumes where an interrupted one
stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocl_fast.curriculum.stages import is_measured
from pocl_fast.run.cache_step import cache_step
from pocl_fast.run.checks import check
from pocl_fast.run.context import RunContext, Say
from pocl_fast.run.evaluate_step import When, evaluate_step
from pocl_fast.run.measure_step import measure_step
from pocl_fast.run.rank_step import rank_step
from pocl_fast.run.sft_step import check_sft, sft_step
from pocl_fast.run.train_step import train_step
from pocl_fast.run.warmup_step import warmup_step
from pocl_fast.run_directory.directory import RunDirectory
from pocl_fast.run_directory.step_inputs import WARMED, warms_up
from pocl_fast.settings.configuration import from_options, recorded_config, settled
from pocl_fast.system import ranks


class Run:
    """The steps of one run; what one of them loads, the next ones find loaded."""

    def __init__(self, context: RunContext) -> None:
        self.context, self.path = context, context.path
        self._is_warm = False  # whether this process has looked after the warm-up

    def distill(self) -> Path:
        """Does every step in order; passes over those that are done. The report's path."""
        self.check()
        config = self.context.config
        if warms_up(config):
            self.evaluate("before")
        if is_measured(config.schedule):
            self.measure()  # which warms up first
        else:
            self.warm_up()
            order = config.schedule.curriculum
            self.context.say(f"measure: left out, for --curriculum {order} does not rank by difficulty")
        self.evaluate("warmed" if warms_up(config) else "before")
        self.evaluate("teacher")
        self.rank()
        self.train()
        self.evaluate("after")
        return self._write_report()

    def fine_tune(self) -> Path:
        """Does every step of a run without a teacher; passes over those that are done. The report's path."""
        check_sft(self.context)
        self.evaluate("before")
        sft_step(self.context)
        self.evaluate("after")
        return self._write_report()

    @property
    def is_warmed_up(self) -> bool:
        """Whether there is a student that was warmed up."""
        return warms_up(self.context.config) and (self.path / WARMED).is_dir()

    def check(self) -> None:
        """Reads data, tokenizers and schedule, to raise `InputError` for what is wrong with them before any step."""
        self.context.directory.check_kind("measure")
        check(self.context)

    def warm_up(self) -> None:
        """Warms the student up, where the options ask for it and it was not done yet."""
        if not self._is_warm:
            warmup_step(self.context)
        self._is_warm = True

    def measure(self) -> None:
        self.warm_up()
        measure_step(self.context)

    def rank(self) -> None:
        rank_step(self.context)

    def cache(self) -> None:
        cache_step(self.context)

    def train(self) -> None:
        self.warm_up()
        train_step(self.context)

    def evaluate(self, when: When) -> None:
        evaluate_step(self.context, when)

    def report(self) -> None:
        self.context.say(f"report: {self._write_report()}")

    def _write_report(self) -> Path:
        from pocl_fast.reports.report import write_report

        encoder = vars(self.context).get("encoder")  # where a step has loaded it
        return ranks.from_first(lambda: write_report(self.path, encoder))


def open_run(output: Path, options: dict[str, Any], *, restart: bool = False, say: Say = print) -> Run:
    """The run in a folder, with `options` over what it recorded; see `RunDirectory` for `restart`."""
    directory = RunDirectory(output, restart=restart)
    return Run(RunContext(directory, settled(from_options(options, recorded_config(output))), say))
