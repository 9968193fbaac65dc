"""Launches the dense kernel's launcher with changing arguments, and prints how many kernels each change would compile.

Run as a script, in a process where Triton's interpreter is off. Nothing is compiled or run: a stand-in takes the launch
and asks Triton what it would look up among the compiled kernels for these arguments on an H100.
"""

from __future__ import annotations

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from pocl_fast.kernels import dense

KEYS: set[str] = set()


class Recorder:
    """Stands in for a kernel: what a launch is compiled for goes to KEYS."""

    def __init__(self, kernel: jit.JITFunction) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: object) -> object:
        def launch(*arguments: object, **options: object) -> None:
            _, specialization, left = self.bind(*arguments, **options)
            KEYS.add(repr((specialization, left)))

        return launch


def rows(
    N: int = 6,
    V: int = 320,
    pad: int = 0,
    tau: int = 1,
    scales: int = 2,
    ignore_index: int = -100,
    shift: int = 0,
    **options: object,
) -> None:
    wide = torch.zeros(2 * N + 2, V + pad, dtype=torch.bfloat16)
    values = torch.ones(N + shift)[shift:]  # shifted by 4 bytes: no longer aligned to 16
    labels = torch.zeros(N + shift, dtype=torch.int64)[shift:]
    defaults = {
        "divergence": "jsd",
        "teacher_share": 0.5,
        "temperature_power": 2,
        "transforms": [0.5, 30.0, 1.0, 0.0],
        "needs_grad": True,
        "reduced": True,
    }
    temperature, scale = (values[: N if count > 1 else 1] for count in (tau, scales))
    dense.distillation_rows(
        wide[:N, :V], wide[N : 2 * N, :V], labels, temperature, values[:1], scale,
        ignore_index=ignore_index, **(defaults | options),
    )  # fmt: skip


CHANGES: dict[str, list[dict[str, object]]] = {
    "N": [{"N": 1}, {"N": 2}, {"N": 16}, {"N": 17}],
    "values a token": [{"tau": 2}, {"N": 1, "tau": 2}, {"scales": 1}],
    "ignore_index": [{"ignore_index": 0}, {"ignore_index": 1}, {"ignore_index": -1}, {"ignore_index": 16}],
    "stride": [{"pad": 16}, {"pad": 48}],
    "teacher_share": [{"teacher_share": share} for share in (0.0, 0.3, 1.0)],
    "transforms": [{"transforms": [1.0, softcap, 2.0, 0.0]} for softcap in (0.0, 1.0, 50.0)],
    "alignment of what is read once a row": [{"shift": 1}],
    "V": [{"V": 336}, {"V": 400}],
    "divergence": [{"divergence": "tvd"}],  # what does compile: shows that the count counts
}


def main() -> None:
    dense._rows_kernel = Recorder(dense._rows_kernel)
    report = {}
    for name, changes in CHANGES.items():
        KEYS.clear()
        rows()
        for change in changes:
            rows(**change)
        report[name] = len(KEYS)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
