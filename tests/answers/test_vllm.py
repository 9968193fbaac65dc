"""Answers by vLLM. It needs a GPU that tests have not, so a module stands in for it that has vLLM's documented
interface and answers with transformers out of the folder it is given."""

import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model
from tiny_run import make_inputs, options, refusal, run, select
from transformers import AutoModelForCausalLM

from pocl_fast.answers import vllm as vllm_engine
from pocl_fast.answers.decoding import generate
from pocl_fast.cutting.cut import cut_layers
from pocl_fast.system.errors import InputError

GPU = torch.device("cuda")
GREEDY = {"temperature": 0.0, "seed": 0}


@dataclass(kw_only=True)
class SamplingParams:
    """Those fields of vLLM's that are set, with its defaults."""

    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None


class LLM:
    """Greedy answers, in which a token that stops stays, as in vLLM; sampled ones are noise out of the seed."""

    made: ClassVar[list["LLM"]] = []

    def __init__(self, model, *, skip_tokenizer_init, dtype, max_model_len, gpu_memory_utilization):
        assert skip_tokenizer_init
        self.settings = (dtype, max_model_len, gpu_memory_utilization)
        self.folder = Path(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.asked = []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not use_tqdm
        self.asked.append(list(sampling_params))
        return [
            Output([Completion(self._answer(**p, how=how))]) for p, how in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt_token_ids, how):
        assert how.ignore_eos
        assert not how.detokenize
        if how.temperature > 0:
            return np.random.default_rng(how.seed).integers(0, 256, how.max_tokens).tolist()
        ids = torch.tensor([prompt_token_ids])
        row = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_tokens,
            do_sample=False,
            eos_token_id=how.stop_token_ids,
        )
        return tuple(row[0, len(prompt_token_ids) :].tolist())


@dataclass
class Completion:
    token_ids: list[int]


@dataclass
class Output:
    outputs: list[Completion] = field(default_factory=list)


@pytest.fixture
def vllm(monkeypatch):
    """A module `vllm`, and a GPU of which a quarter is taken."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    monkeypatch.setattr(LLM, "made", [])
    return module


def test_it_answers_where_it_is_installed_and_there_is_a_gpu(vllm, monkeypatch):
    assert vllm_engine.chosen("auto", GPU)
    assert vllm_engine.chosen("vllm", GPU)
    assert not vllm_engine.chosen("torch", GPU)
    assert not vllm_engine.chosen("auto", torch.device("cpu"))
    with pytest.raises(InputError, match="needs a CUDA GPU, and the device is cpu"):
        vllm_engine.chosen("vllm", torch.device("cpu"))
    monkeypatch.setattr("pocl_fast.system.ranks.world_size", lambda: 2)
    assert not vllm_engine.chosen("auto", GPU)
    with pytest.raises(InputError, match="answers in one process: leave torchrun out"):
        vllm_engine.chosen("vllm", GPU)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_where_it_is_not_installed_the_extra_is_named(tmp_path, capsys):
    assert not vllm_engine.chosen("auto", GPU)
    with pytest.raises(InputError, match=r'pip install "pocl-fast\[vllm\]"'):
        vllm_engine.chosen("vllm", GPU)
    inputs = make_inputs(tmp_path)
    words = select(options(inputs), "measure")
    assert "vLLM is not installed" in refusal(capsys, "measure", tmp_path / "o", *words, "--generation-engine", "vllm")


def test_answers_are_those_of_torch_for_a_student_that_was_cut_in_memory(vllm):
    student = cut_layers(tiny_model(layers=4), 2)
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]
    first = generate(student, prompts, max_new_tokens=12, end_ids={258}, pad_id=256)
    ends = {first[0][3], 258}  # so that an answer ends early
    want = generate(student, prompts, max_new_tokens=12, end_ids=ends, pad_id=256)
    with vllm_engine.loaded(student, max_length=99, dtype="float32") as engine:
        (llm,) = LLM.made
        assert llm.folder.is_dir()
        done = []
        settings = {"max_new_tokens": 12, "end_ids": ends, "progress": done.append}
        assert engine.generate(prompts, sample_ids=range(3), **GREEDY, **settings) == want
    assert done == [3]
    assert len(want[0]) < 12
    assert llm.settings == ("float32", 99, pytest.approx(0.8 * 0.75))
    assert all((how.temperature, how.seed, how.max_tokens) == (0.0, None, 12) for how in llm.asked[0])
    assert not llm.folder.exists()


def test_every_sample_has_a_seed_of_its_own_that_is_the_same_in_any_order(vllm):
    with vllm_engine.loaded(tiny_model(), max_length=99, dtype="float32") as engine:
        limits = {"max_new_tokens": 6, "end_ids": {258}, "temperature": 0.7}
        one = engine.generate([[1], [1], [1]], sample_ids=[3, 5, 4], seed=1, **limits)
        assert len({tuple(answer) for answer in one}) == 3
        assert engine.generate([[1], [1]], sample_ids=[4, 3], seed=1, **limits) == [one[2], one[0]]
        assert engine.generate([[1]], sample_ids=[3], seed=2, **limits) != [one[0]]
    assert all(how.temperature == 0.7 and 0 <= how.seed < 2**63 for how in LLM.made[0].asked[0])


def test_a_model_that_vllm_cannot_load_is_one_clear_message(vllm, monkeypatch):
    def refuse(**_):
        raise ValueError("Model architectures ['LlamaForCausalLM'] are not supported for now.")

    monkeypatch.setattr(vllm, "LLM", refuse)
    with (
        pytest.raises(
            InputError, match=r"vLLM cannot load this LlamaForCausalLM \(ValueError: .*generation_engine torch"
        ),
        vllm_engine.loaded(tiny_model(), max_length=9, dtype="float32"),
    ):
        pass


def test_measure_and_evaluate_ask_vllm_and_give_what_torch_gives(vllm, tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path / "inputs")
    words = options(inputs, eval_seeds=(10,))
    assert run("measure", tmp_path / "torch", *select(words, "measure")) == 0
    assert LLM.made == []
    monkeypatch.setattr(vllm_engine, "chosen", lambda engine, device: engine != "torch")  # as on a GPU
    monkeypatch.setattr(vllm_engine, "BATCH", 10)
    assert run("measure", tmp_path / "vllm", *select(words, "measure")) == 0
    (llm,) = LLM.made
    assert [len(asked) for asked in llm.asked] == [10, 10, 4]
    assert llm.settings[:2] == ("float32", 80 + 4)
    ours, theirs = (pq.read_table(tmp_path / name / "difficulty.parquet") for name in ("vllm", "torch"))
    assert ours.drop("cross_entropy").equals(theirs.drop("cross_entropy"))
    np.testing.assert_allclose(ours["cross_entropy"].to_numpy(), theirs["cross_entropy"].to_numpy(), rtol=1e-6)
    assert run("evaluate", tmp_path / "vllm", *select(words, "evaluate")) == 0
    assert [len(asked) for made in LLM.made[1:] for asked in made.asked] == [8, 8]  # the student's and the teacher's
    assert run("evaluate", tmp_path / "torch", *select(words, "evaluate"), "--generation-engine", "torch") == 0
    assert len(LLM.made) == 3
