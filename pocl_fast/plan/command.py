"""What `pocl-fast plan` prints. Knows the command line's words for it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from pocl_fast.options.run import RunConfig


def print_plan(config: RunConfig, output: Path | None, *, as_json: bool, times: bool) -> None:
    """Prints the plan of a run with these options, as a table or as JSON. Raises `InputError` as `make_plan` does."""
    from pocl_fast.plan.plan import make_plan
    from pocl_fast.plan.table import plan_table

    with contextlib.redirect_stdout(sys.stderr):  # what libraries say is no part of the plan
        plan = make_plan(config, output, times=times)
    print(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) if as_json else plan_table(plan))
