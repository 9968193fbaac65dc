"""Answers to prompts by vLLM, on a CUDA GPU, where the extra `vllm` is installed.

Gives what `generation.generate` gives: token ids in, token ids out. Does not know what the answers are for.
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

from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError

FREE_MEMORY = 0.8  # of what the models leave of the GPU is vLLM's: its weights, keys and values


def chosen(engine: Literal["auto", "torch", "vllm"], device: torch.device) -> bool:
    """Whether vLLM answers. Raises `InputError` where it is asked for and cannot."""
    installed = importlib.util.find_spec("vllm") is not None
    on_gpu = device.type == "cuda" and torch.version.hip is None
    if engine == "vllm":
        if not installed:
            raise InputError('--generation-engine vllm: vLLM is not installed; pip install "pocl-fast[vllm]"')
        if not on_gpu:
            raise InputError(f"--generation-engine vllm needs a CUDA GPU, and --device is {device}")
        if ranks.world_size() > 1:
            raise InputError("--generation-engine vllm answers in one process: leave torchrun out, or take torch")
    return engine != "torch" and installed and on_gpu and ranks.world_size() == 1


class VllmEngine:
    """A model in vLLM's memory."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def release(self) -> None:
        """Lets go of vLLM, whose memory is free once nothing refers to it."""
        self._llm = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_ids: Collection[int],
        temperature: float = 0.0,
        seed: int = 0,
        sample_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The answer to each prompt, as token ids without the end token: greedy at `temperature` 0, else sampled from
        the whole distribution, each answer from a seed made of `seed` and its entry in `sample_ids`."""
        from vllm import SamplingParams, TokensPrompt

        ids = range(len(prompts)) if sample_ids is None else sample_ids
        settings = [
            SamplingParams(
                temperature=temperature,
                seed=_seed_of(seed, i) if temperature > 0 else None,
                max_tokens=max_new_tokens,
                stop_token_ids=sorted(end_ids),
                ignore_eos=True,  # `end_ids` say it
                detokenize=False,
            )
            for i in ids
        ]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], settings, use_tqdm=False
        )
        return [_before_the_end(output.outputs[0].token_ids, end_ids) for output in outputs]


@contextlib.contextmanager
def loaded(model: Any, *, max_length: int, dtype: Literal["bfloat16", "float32"]) -> Iterator[VllmEngine]:
    """The model in vLLM within the block: saved to a temporary folder, as vLLM reads folders, and read from there.

    `max_length` is the most tokens of a prompt and its answer. Raises `InputError` where vLLM cannot load the model.
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
                " --generation-engine torch can"
            ) from error
        engine = VllmEngine(llm)
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
