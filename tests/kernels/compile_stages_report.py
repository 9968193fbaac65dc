"""Compiles the dense kernel with loops that the compiler pipelines; prints and is run as `compile_report.py`."""

from __future__ import annotations

from compile_report import cases as chosen
from compile_report import report, source


def cases(few: bool = False) -> list[dict[str, object]]:
    """On sm_90: a family of two passes and one of three in bf16, one tile ahead and three; and three tiles ahead fp32
    and a ragged row. `few`: each family in bf16 once. (All cases of compile_report.py passed with 2 and 4 stages when
    these were chosen, with a few more words of stack.)"""
    two = [case for case in chosen() if case["family"] in ("forward_kl", "jsd")][:2]
    grid = [case | {"stages": stages} for stages in (2, 4) for case in two]
    *_, last = grid
    bf16 = [grid[1], grid[2]] if few else grid
    return [*bf16, last | {"student": "fp32", "teacher": "fp32"}, grid[2] | {"V": 50257, "ragged": True}]


if __name__ == "__main__":
    report(cases, lambda case: source(case, case["stages"]))
