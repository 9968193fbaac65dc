"""Whole runs of the trainer on conversations against plain torch: the same weights after every step, however the batch
is split."""

import pytest
import torch
from test_all_answers import ALPHA, TEMPERATURE, conversation, plain_loss
from tiny import tiny_tokenizer
from tiny_training import curriculum_of, student_model, teacher_model

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import fit_all
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

RATE = 0.1


def sample_set():
    given = [conversation(index, count) for index, count in enumerate((1, 8, 3, 2))]
    limits = {"max_length": 500, "max_prompt_length": 80, "long_prompts": "error", "name": "x"}
    fitted, _ = fit_all(given, SampleEncoder(tiny_tokenizer()), **limits)
    return SampleSet([used for used, _ in fitted], [one for _, one in fitted])


def stepped(samples):
    """A student after one plain step of SGD on the mean over all supervised tokens of the samples."""
    student = student_model()
    plain_loss(student, teacher_model(), samples).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= RATE * parameter.grad
    return student


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        {"tokens_per_batch": 100_000},
    ],
    ids=str,
)
def test_a_step_on_conversations_is_plain_torchs_step_on_all_their_answers(tmp_path, options):
    samples, student = sample_set(), student_model()
    settings = {
        "epochs_per_stage": 1, "max_new_tokens": 2, "precision": "fp32", "use_cpu": True, "max_length": 500,
        "max_prompt_length": 80, "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "warmup_steps": 0, "weight_decay": 0.0,
    }  # fmt: skip
    config = PoclConfig(output_dir=str(tmp_path), **settings, **options)
    teacher = Teacher(teacher_model(), tmp_path / "cache", cache_dtype=torch.float32)
    given = curriculum_of(4, stages=1, temperatures=[TEMPERATURE], alphas=[ALPHA])
    trainer = PoclTrainer(student, teacher, config, samples, None, tiny_tokenizer(), curriculum=given)
    trainer.train()
    assert trainer.state.global_step == 1
    for (name, ours), want in zip(student.named_parameters(), stepped(samples.encoded).parameters(), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
