"""Training of a tiny student from a tiny teacher, without a run directory around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import PAPERS_STAGES, arithmetic, tiny_model, tiny_tokenizer

from pocl_fast.curriculum.stages import Curriculum, baby_steps
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.records.samples import samples_from
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.stage_flow import MetricsFile
from pocl_fast.training.trainer import PoclTrainer

LIMITS: dict[str, Any] = {"max_length": 96, "max_prompt_length": 80, "long_prompts": "error", "name": "tiny"}


def encoded_samples(count: int, start: int = 0) -> tuple[list[Any], list[EncodedSample]]:
    samples = samples_from(arithmetic(count, start), "tiny")
    return samples, encode_all(samples, SampleEncoder(tiny_tokenizer()), **LIMITS)[0]


def student_model(seed: int = 0) -> Any:
    student = tiny_model(layers=2, seed=seed).float()
    enable_packing(student)
    return student


def teacher_model(seed: int = 1) -> Any:
    teacher = tiny_model(layers=4, seed=seed)
    enable_packing(teacher)
    return teacher


def curriculum_of(count: int, **settings: Any) -> Curriculum:
    """Stages over the samples in file order."""
    return baby_steps(np.arange(count), np.zeros(count), **settings)


def trainer_of(
    folder: Path,
    *,
    curriculum: Curriculum | None = None,
    count: int | None = None,
    student: Any = None,
    teacher: Any = None,
    dev: bool = True,
    supervised: bool = False,
    **options: Any,
) -> PoclTrainer:
    """A trainer on as many samples as the curriculum has, or `count`; 4 dev samples; `supervised` without a
    teacher."""
    folder.mkdir(exist_ok=True)
    train_set = SampleSet(*encoded_samples(count or len(curriculum.order)))
    if "kind" in options:  # of the configuration
        options["curriculum"] = options.pop("kind")
    kept = {name: options.pop(name) for name in ("peft_config", "callbacks") if name in options}
    settings = {
        "per_device_train_batch_size": 4, "epochs_per_stage": 1, "max_new_tokens": 2, "precision": "fp32",
        "use_cpu": True, "max_length": 96, "max_prompt_length": 80,
    } | PAPERS_STAGES  # fmt: skip
    if supervised:
        settings["alpha"] = [1.0, 1.0]
    elif teacher is None:
        teacher = Teacher(teacher_model(), folder / "teacher_cache", cache_dtype=torch.float32)
    return PoclTrainer(
        student or student_model(),
        teacher,
        PoclConfig(output_dir=str(folder), **(settings | options)),
        train_set,
        SampleSet(*encoded_samples(4, start=200)) if dev else None,
        tiny_tokenizer(),
        curriculum=curriculum,
        **({"callbacks": [MetricsFile(folder / "metrics.jsonl")]} | kept),
    )


def train(folder: Path, **options: Any) -> Any:
    """The student after such a training, which goes on where an earlier one in the folder stopped."""
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=True)
    return trainer.model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def before_each_batch(monkeypatch: Any, do: Any) -> None:
    """Calls `do(number, trainer, samples)` before each training batch, numbered from 1 over all stages."""
    compute_loss, count = PoclTrainer.compute_loss, [0]

    def wrapped(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        do(count[0], self, inputs.samples)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PoclTrainer, "compute_loss", wrapped)


def transformers_loss(model: Any, sample: EncodedSample) -> float:
    """transformers' own loss of a sample's response."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()
