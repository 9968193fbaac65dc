"""What is refused or changed of a student before it trains: frozen, in half precision, with its teacher's weights."""

import copy

import pytest
import torch
from tiny import tiny_model
from tiny_training import curriculum_of, teacher_model, trainer_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig

from pocl_fast.system.errors import InputError
from pocl_fast.training.metrics import read_metrics

ONE_STAGE = {"dev": False, "epochs_per_stage": 1, "logging_steps": 1}


def trained(folder, student, teacher=None, *, alpha=1.0, **options):
    curriculum = curriculum_of(4, stages=1, temperatures=[1.0], alphas=[alpha])
    trainer = trainer_of(
        folder, curriculum=curriculum, student=student, teacher=teacher or teacher_model(), **ONE_STAGE, **options
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: float((p != before[name]).float().mean()) for name, p in trainer.model.named_parameters()}
    return trainer, moved, [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def test_a_student_with_more_behind_its_lm_head_trains_on_its_own_logits(tmp_path):
    class Cooled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.3
            return output

    student = Cooled(tiny_model().config).eval()
    student.load_state_dict(tiny_model().state_dict())
    own = copy.deepcopy(student)
    trainer, _, losses = trained(tmp_path, student)
    total = tokens = 0
    for one in trainer.samples.encoded:
        ids = torch.tensor([one.prompt_ids + one.response_ids])
        with torch.no_grad():
            logits = own(ids).logits[0, len(one.prompt_ids) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(one.response_ids), reduction="sum"))
        tokens += len(one.response_ids)
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_in_half_precision_trains_with_fp32_weights_and_is_told(tmp_path, capsys, dtype):
    _, moved, losses = trained(tmp_path / "half", tiny_model().to(dtype))
    assert min(moved[name] for name in moved if "layers" in name and "norm" not in name) > 0.9
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert f"the student trains with fp32 weights, made of its 26880 in {name}" in capsys.readouterr().out
    assert losses == trained(tmp_path / "fp32", tiny_model().to(dtype).float())[2]


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_adapters_over_a_base_in_bf16_train_on_a_cpu(tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    _, moved, _ = trained(tmp_path, peft.get_peft_model(tiny_model(tied=False).bfloat16(), config))
    assert any(moved[name] > 0 for name in moved if "lm_head" in name)
    assert all(value == 0 for name, value in moved.items() if "base_layer" in name or "embed" in name)


def test_a_frozen_student_is_refused(tmp_path):
    with pytest.raises(InputError, match="the student is frozen, none of its weights requires a gradient"):
        trained(tmp_path, tiny_model().requires_grad_(False))


def test_a_student_that_shares_weights_with_its_teacher_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    with pytest.raises(InputError, match=r"share 20 of the student's 20 weights.*copy\.deepcopy"):
        trained(tmp_path / "same", model, model, alpha=0.5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="share 24 of the student's 24 weights"):
        trained(tmp_path / "adapters", adapted, model, alpha=0.5)
    other = tiny_model(seed=1)
    other.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data  # one storage, two parameters
    with pytest.raises(InputError, match="share 1 of the student's 20 weights"):
        trained(tmp_path / "storage", other, model, alpha=0.5)
    trained(tmp_path / "copy", copy.deepcopy(model), model, alpha=0.5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_routers_loss_of_a_mixture_of_experts_is_added_to_the_steps_loss(tmp_path, accumulated):
    def student(asks):
        experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "output_router_logits": asks}
        config = MixtralConfig(
            vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=256, eos_token_id=258, bos_token_id=None, router_aux_loss_coef=1.0,
            **experts,
        )  # fmt: skip
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    parts = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4 // accumulated}
    without = trained(tmp_path / "without", student(False), **parts)[2][0]
    _, _, losses = trained(tmp_path / "with", student(True), **parts)
    assert losses[0] - without == pytest.approx(1.0, abs=0.2)  # of a balanced router; twice that if it were summed


def test_a_refusal_leaves_a_student_in_half_precision_as_it_was(tmp_path):
    for name, refused in (
        ("frozen", {"student": tiny_model().bfloat16().requires_grad_(False)}),
        ("top-k", {"student": tiny_model(vocab_size=264).bfloat16(), "cache_mode": "topk"}),
    ):
        teacher = tiny_model(layers=3, seed=1)
        with pytest.raises(InputError):
            trainer_of(tmp_path / name, curriculum=curriculum_of(4, stages=1), teacher=teacher, dev=False, **refused)
        assert {p.dtype for p in refused["student"].parameters()} == {torch.bfloat16}
