"""Calls the kernels' launchers with changing arguments, and prints how many kernels each change would compile.

Run as a script, in a process where Triton's interpreter is off: a line of JSON a kernel. Nothing is compiled or run: a
stand-in takes the launch and asks Triton what it would look up among the compiled kernels for these arguments on an
H100.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from pocl_fast.kernels import dense, sparse
from pocl_fast.loss.arguments import Settings, Tokens

KEYS: set[str] = set()
Changes = dict[str, list[dict[str, object]]]


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


SETTINGS = Settings("jsd", 0.5, 2, -100, [0.5, 30.0, 1.0, 0.0], "bucket")


def shifted(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> torch.Tensor:
    """Zeros; shifted by single elements, they are no longer aligned to 16 bytes."""
    return torch.zeros(torch.Size(shape).numel() + shift, dtype=dtype)[shift:].view(shape)


def values_of(N: int, shift: int, *counts: int) -> list[torch.Tensor]:
    """A value for each token where the count is above 1, else one for all."""
    return [shifted((N if count > 1 else 1,), torch.float32, shift) for count in counts]


def logits(N: int, V: int, pad: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(N, V + pad, dtype=dtype)[:, :V]


def rows(
    N: int = 6,
    V: int = 320,
    K: int | None = None,
    pad: int = 0,
    temperatures: int = 1,
    alphas: int = 1,
    scales: int = 2,
    shift: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> None:
    """The row kernel: the sparse one where the teacher has K entries a token."""
    if K is None:
        launch, teacher = dense.distillation_rows, [logits(N, V, pad, dtype)]
    else:
        teacher = [shifted((N, K), kind, shift) for kind in (torch.float32, torch.int64)]
        launch = sparse.sparse_distillation_rows
    tokens = Tokens(shifted((N,), torch.int64, shift), *values_of(N, shift, temperatures, alphas, scales))
    settings = SETTINGS._replace(**changes)
    launch(logits(N, V, pad, dtype), *teacher, tokens, settings, needs_grad=True, reduced=True)


def scale(
    N: int = 6, V: int = 320, pad: int = 0, scales: int = 2, shift: int = 0, dtype: torch.dtype = torch.bfloat16
) -> None:
    dense.scale_rows_(logits(N, V, pad, dtype), *values_of(N, shift, scales))


# of any kernel; the last does compile, which shows that the count counts
GENERAL: Changes = {
    "N": [{"N": 1}, {"N": 2}, {"N": 16}, {"N": 17}],
    "stride": [{"pad": 16}, {"pad": 48}],
    "alignment of what is read once a row": [{"shift": 1}],
    "V": [{"V": 336}, {"V": 400}],
    "a scale a token": [{"scales": 1}, {"N": 1, "scales": 1}],
    "dtype": [{"dtype": torch.float32}],
}
OF_ROWS: Changes = GENERAL | {
    "values a token": [{"temperatures": 2}, {"alphas": 2}, {"temperatures": 2, "alphas": 2}, {"N": 1, "alphas": 2}],
    "ignore_index": [{"ignore_index": 0}, {"ignore_index": 1}, {"ignore_index": -1}, {"ignore_index": 16}],
    "teacher_share": [{"teacher_share": share} for share in (0.0, 0.3, 1.0)],
    "divergence": [{"divergence": "tvd"}],  # compiles, too
}
SOFTCAPS = (0.0, 1.0, 50.0)
KERNELS: dict[str, tuple[Callable[..., None], Changes]] = {
    "dense": (rows, OF_ROWS | {"transforms": [{"transforms": [1.0, x, 2.0, 0.0]} for x in SOFTCAPS]}),
    "sparse": (
        functools.partial(rows, K=7),
        OF_ROWS
        | {
            "K": [{"K": 1}, {"K": 16}, {"K": 32}],
            "transforms": [{"transforms": [2.0, x, 1.0, 0.0]} for x in SOFTCAPS],
        },
    ),
    "scale": (scale, GENERAL),
}


def main() -> None:
    dense._rows_kernel = Recorder(dense._rows_kernel)
    dense._scale_rows_kernel = Recorder(dense._scale_rows_kernel)
    sparse._sparse_rows_kernel = Recorder(sparse._sparse_rows_kernel)
    for kernel, (call, changes) in KERNELS.items():
        report: dict[str, object] = {"kernel": kernel}
        for name, these in changes.items():
            KEYS.clear()
            call()
            for change in these:
                call(**change)
            report[name] = len(KEYS)
        print(json.dumps(report))


if __name__ == "__main__":
    main()
