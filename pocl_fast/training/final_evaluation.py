"""The final evaluation of a trained student: sampled answers over several seeds, as the `evaluate` command makes them.

Knows a student and samples. Does not know stages or the optimisation.
"""

from __future__ import annotations

import contextlib
from typing import Any

from pocl_fast.answers import vllm
from pocl_fast.answers.evaluation import Scores, evaluate
from pocl_fast.data.records import SampleEncoder, SampleSet
from pocl_fast.models.loading import Precision
from pocl_fast.training.arguments import PoclConfig


def final_scores(
    student: Any, samples: SampleSet, encoder: SampleEncoder, args: PoclConfig, precision: Precision, *, packed: bool
) -> tuple[Scores, list[str]]:
    """The student's scores over `eval_seeds` on the samples, and its answers from the first seed. vLLM generates the
    answers where `generation_engine` chooses it. Every rank must call."""
    engine: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if vllm.chosen(args.generation_engine, args.device):
        longest = args.max_prompt_length + args.max_new_tokens
        engine = vllm.loaded(student, max_length=longest, dtype="bfloat16" if precision.name == "bf16" else "float32")
    with engine as chosen:
        return evaluate(
            student,
            samples.samples,
            samples.encoded,
            encoder,
            seeds=args.eval_seeds,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.generation_batch_size,
            batch_tokens=args.generation_batch_tokens,
            packed=packed,
            engine=chosen,
        )
