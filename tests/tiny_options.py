"""Every option of a run with a value that is not its default, and what the tests that show them share."""

from dataclasses import fields

import pytest
from tiny import arithmetic, write_jsonl
from tiny_run import make_inputs
from tiny_training import curriculum_of, trainer_of

from pocl_fast.options.declaring import option_name
from pocl_fast.options.run import RunConfig
from pocl_fast.run.steps import open_run
from pocl_fast.settings.configuration import from_options

CHANGED = {
    "teacher": "the/teacher",
    "student": "the/student",
    "student_layers": 3,
    "layer_choice": "importance",
    "teacher_quantization": "8bit",
    "teacher_device": "meta",
    "precision": "bf16",
    "device": "meta",
    "trust_remote_code": True,
    "train": "three.jsonl",
    "dev": {"two": "two.jsonl"},
    "test": {"others": "three.jsonl", "more": "two.jsonl"},
    "train_on": "last",
    "reasoning": "strip",
    "fields": {"instruction": "question", "output": "answers.text"},
    "bad_records": "skip",
    "special_tokens": "parse",
    "template": "alpaca",
    "chat_template": "kind",
    "chat_template_kwargs": {"tone": "warm"},
    "system_prompt": "Be brief.",
    "max_length": 60,
    "max_prompt_length": 50,
    "long_prompts": "skip",
    "data_source": "teacher",
    "held_out": 1,
    "lora_rank": 3,
    "lora_alpha": 5.0,
    "lora_targets": ["q_proj", "up_proj"],
    "peft_config": "settings",
    "merge_adapters": True,
    "max_new_tokens": 2,
    "generation_batch_size": 3,
    "generation_batch_tokens": 40,
    "generation_engine": "vllm",
    "rouge_tokenizer": "characters",
    "signals": "answer_length=2,cross_entropy",
    "measure_temperature": 0.7,
    "measure_seed": 3,
    "warmup_epochs": 2,
    "warmup_steps": 3,
    "warmup_learning_rate": 2e-3,
    "curriculum": "none",
    "stages": 3,
    "pacing": "competence",
    "initial_competence": 0.25,
    "full_competence": 0.5,
    "rrf_k": 7.0,
    "ties": "first",
    "temperature": [3.0, 4.0],
    "alpha": [0.5, 0.25],
    "divergence": "jsd",
    "beta": 0.3,
    "skew": 0.2,
    "temperature_scaling": "tau",
    "within_stage": "linear",
    "epochs_per_stage": 3,
    "steps_per_stage": 5,
    "stage_length": "equal",
    "patience": 1,
    "fresh_optimizer": True,
    "fresh_learning_rate": True,
    "stage_weights": "last",
    "remeasure": True,
    "batch_size": 2,
    "tokens_per_batch": 50,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "weight_decay": 0.2,
    "max_grad_norm": 0.5,
    "activation_checkpointing": True,
    "on_nonfinite": "skip",
    "seed": 5,
    "logging_steps": 1.0,
    "report_to": ["tensorboard"],
    "save_minutes": 1e-9,
    "set": {"optim": "sgd", "lr_scheduler_type": "linear"},
    "rollouts": "adaptive",
    "lmbda": 0.25,
    "mixed_alpha": 0.75,
    "loss_eps": 0.3,
    "replay_ratio": "constant",
    "replay_capacity": 7,
    "cache_mode": "topk",
    "cache_dtype": "int8",
    "cache_top_k": 5,
    "eval_seeds": [3, 4],
    "score_teacher": False,
}
SHOWN = set()


def reaches(*names):
    """Marks a test that shows these options, and gives it their values as `changed`."""
    SHOWN.update(names)
    return pytest.mark.parametrize("changed", [{name: CHANGED[name] for name in names}], ids=[",".join(names)])


def trainer_with_options(parent, changed, *, folder="out", count=8, stages=1, given=True, **settings):
    """A tiny trainer below `parent` whose arguments have these options. Its curriculum is the samples in file order, or
    none where not `given`."""
    config = from_options(changed)
    options = {name: value for name, value in config.trainer_options().items() if name in _fields(changed)}
    curriculum = curriculum_of(count, stages=stages) if given else None
    if "curriculum" in options:
        options["kind"] = options.pop("curriculum")  # as `trainer_of` calls it
    return trainer_of(parent / folder, curriculum=curriculum, count=count, **(settings | options | config.trainer.set))


def _fields(changed):
    """The fields of these options."""
    every = {option_name(f): f.name for group in fields(RunConfig) for f in fields(getattr(RunConfig(), group.name))}
    return {every[name] for name in changed}


def inputs_of_three(folder):
    """A tiny run's inputs, with a file of three samples and one of two."""
    make_inputs(folder, train=6, dev=2)
    write_jsonl(folder / "three.jsonl", arithmetic(3))
    write_jsonl(folder / "two.jsonl", arithmetic(2, start=50))
    return folder


def run_with_options(inputs, parent, folder="out", **options):
    """A tiny run with these options over a few defaults, opened in a folder of `parent`."""
    given = {
        "teacher": str(inputs / "teacher"), "student_layers": 2, "train": inputs / "train.jsonl",
        "dev": inputs / "dev.jsonl", "max_length": 96, "max_prompt_length": 80, "max_new_tokens": 2,
        "generation_batch_size": 8, "precision": "fp32", "device": "cpu", "eval_seeds": [1],
    }  # fmt: skip
    return open_run(parent / folder, given | options)
