"""The first look: the options of a run that takes a few minutes on two cores, on what the package brings along."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from pocl_fast.models.loading import BUNDLED


def bundled_data(split: str) -> Path:
    """The demo's samples, "train" or "dev": instructions composed from templates, responses written by the bundled
    teacher."""
    return Path(str(files("pocl_fast.run.demo_data") / f"demo.{split}.jsonl"))


def demo_options() -> dict[str, Any]:
    """SmolLM2-135M-Instruct distilled into six of its layers, which learn the references first."""
    return {
        "teacher": BUNDLED,
        "student_layers": 6,
        "layer_choice": "importance",
        "warmup_epochs": 2,  # the cut student answers gibberish, whose difficulty would be the order of the file
        "train": bundled_data("train"),
        "dev": bundled_data("dev"),
        "max_length": 160,
        "max_prompt_length": 112,
        "long_prompts": "skip",
        "max_new_tokens": 32,
        "generation_batch_size": 128,
        "stage_weights": "last",
        "epochs_per_stage": 1,
        "batch_size": 16,
        "learning_rate": 7e-4,  # two and a half passes in all, where the paper makes twenty: larger steps
        "eval_seeds": (10,),  # the intervals are over samples
    }
