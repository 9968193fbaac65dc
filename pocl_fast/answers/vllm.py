"""The engine that answers with vLLM, on a CUDA GPU, where the extra `vllm` is installed.

Knows when vLLM can answer, and how a model gets into it. Does not know samples, nor what the answers are for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pocl_fast.answers.engine import AnswerOptions, Engine, TorchEngine, own_ends
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.inputs.vocabulary import unsayable_ids
from pocl_fast.system import ranks
from pocl_fast.system.console import Report
from pocl_fast.system.errors import InputError

FREE_MEMORY = 0.8  # vLLM's share of the GPU memory that the models leave free: for its weights, keys and values
LEAST_BIAS = -100.0  # the lowest that vLLM adds to a logit
BATCH = 1024  # prompts that vLLM gets at once; it puts them into batches of its own


def chosen(engine: Literal["auto", "torch", "vllm"], device: torch.device) -> bool:
    """Whether vLLM answers. Raises `InputError` where it is asked for and cannot."""
    installed = importlib.util.find_spec("vllm") is not None
    on_gpu = device.type == "cuda" and torch.version.hip is None
    if engine == "vllm":
        if not installed:
            raise InputError('generation_engine vllm: vLLM is not installed; pip install "pocl-fast[vllm]"')
        if not on_gpu:
            raise InputError(f"generation_engine vllm needs a CUDA GPU, and the device is {device}")
        if ranks.world_size() > 1:
            raise InputError("generation_engine vllm answers in one process: leave torchrun out, or take torch")
    return engine != "torch" and installed and on_gpu and ranks.world_size() == 1


def engine_of(
    model: Any, encoder: SampleEncoder, options: AnswerOptions, *, max_prompt_length: int, by_vllm: bool, bf16: bool
) -> contextlib.AbstractContextManager[Engine]:
    """What generates the model's answers within the block: torch, or `by_vllm` vLLM with the model in it, in bf16 or
    fp32."""
    if not by_vllm:
        return contextlib.nullcontext(TorchEngine.of(model, encoder, options))
    longest = max_prompt_length + options.max_new_tokens
    forbidden = unsayable_ids(encoder.tokenizer, model)
    return loaded(model, max_length=longest, dtype="bfloat16" if bf16 else "float32", forbidden_ids=forbidden)


class VllmEngine:
    """An `Engine` by a model in vLLM's memory."""

    def __init__(self, llm: Any, ends: Collection[int] = (), forbidden_ids: Sequence[int] = ()) -> None:
        """`ends` are the model's own stop tokens; no answer has one of `forbidden_ids`."""
        self._llm, self._ends = llm, frozenset(ends)
        self._bias = dict.fromkeys(forbidden_ids, LEAST_BIAS) or None

    def release(self) -> None:
        """Drops the reference to vLLM: its memory is free once nothing refers to it."""
        self._llm = None

    def batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        every = range(len(prompts))
        return [list(every[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sample_ids: Sequence[int],
        end_ids: Collection[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        shared: bool = False,  # changes nothing: vLLM answers where there is one rank
        progress: Report | None = None,
    ) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

        end_ids = self._ends | set(end_ids)
        settings = [
            SamplingParams(
                temperature=temperature,
                seed=_seed_of(seed, i) if temperature > 0 else None,
                max_tokens=max_new_tokens,
                stop_token_ids=sorted(end_ids),
                ignore_eos=True,  # `end_ids` are the end tokens
                detokenize=False,
                logit_bias=self._bias,
            )
            for i in sample_ids
        ]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], settings, use_tqdm=False
        )
        if progress:
            progress(len(prompts))
        return [_before_the_end(output.outputs[0].token_ids, end_ids) for output in outputs]


@contextlib.contextmanager
def loaded(
    model: Any, *, max_length: int, dtype: Literal["bfloat16", "float32"], forbidden_ids: Sequence[int] = ()
) -> Iterator[VllmEngine]:
    """The model in vLLM within the block: saved to a temporary folder, as vLLM reads folders, and read from there.

    `max_length` is the most tokens of a prompt and its answer; no answer has one of `forbidden_ids`. Raises
    `InputError` where vLLM cannot load the model.
    """
    from vllm import LLM

    torch.cuda.empty_cache()  # what torch keeps for later is not free otherwise
    free, total = torch.cuda.mem_get_info()
    with tempfile.TemporaryDirectory(prefix="pocl-fast-") as folder:
        model.save_pretrained(folder)
        try:
            llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=max_length,
                gpu_memory_utilization=FREE_MEMORY * free / total,
            )
        except Exception as error:  # vLLM's own kinds are many
            raise InputError(
                f"vLLM cannot load this {type(model).__name__} ({type(error).__name__}: {error});"
                " generation_engine torch can"
            ) from error
        engine = VllmEngine(llm, own_ends(model), forbidden_ids)
        del llm
        try:
            yield engine
        finally:
            engine.release()
            gc.collect()
            torch.cuda.empty_cache()


def _before_the_end(tokens: Sequence[int], end_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return list(tokens[:end])


def _seed_of(seed: int, sample_id: int) -> int:
    return int(np.random.SeedSequence([seed, sample_id]).generate_state(1, np.uint64)[0] >> np.uint64(1))
