"""What a training can be told: stages, batches, adapters, models and data given in other ways."""

import math
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import arithmetic, save_tiny, tiny_model
from tiny_training import (
    before_each_batch,
    curriculum_of,
    encoded_samples,
    same_bits,
    student_model,
    teacher_model,
    train,
    trainer_of,
    weights_of,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    HfArgumentParser,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    TrainerCallback,
)

from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.data.encoding import SampleSet
from pocl_fast.loss.objective import Objective
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.trainer import PoclTrainer

FOUR = {"per_device_train_batch_size": 4, "use_cpu": True, "precision": "fp32", "max_new_tokens": 2}


def metrics(folder, name):
    return {r["step"]: r[name] for r in read_metrics(folder / "metrics.jsonl") if name in r}


# -- stages ------------------------------------------------------------------------------------------------------------


EVALUATE = PoclTrainer.evaluate


def scores(monkeypatch, values):
    """Evaluations give these ROUGE-Ls (percent) in turn, and then the power is cut."""
    given = list(values)

    def evaluate(self, *args, **kwargs):
        if not given:
            raise RuntimeError("power cut")
        found = type("RougeL", (), {"fmeasure": np.array([given.pop(0) / 100])})
        monkeypatch.setattr("pocl_fast.answers.evaluation.rouge_l", lambda *_: found)
        return EVALUATE(self, *args, **kwargs)

    monkeypatch.setattr(PoclTrainer, "evaluate", evaluate)


def test_a_stage_ends_when_patience_is_over_and_the_next_begins_from_its_best_weights(tmp_path, monkeypatch):
    scores(monkeypatch, [10, 20, 15, 19, 30, 30, 30, 99])
    seen = []
    before_each_batch(
        monkeypatch, lambda n, trainer, s: seen.append((trainer.progress.stage, weights_of(trainer.model)))
    )
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), epochs_per_stage=7, patience=2)
    trainer.train()
    assert [stage for stage, _ in seen] == [0] * 4 + [1] * 6  # 1 and 2 steps a pass
    assert same_bits(seen[4][1], seen[2][1])  # the weights after the second pass, as the third found them
    assert trainer.state.global_step == trainer.state.max_steps == 10
    rates = metrics(tmp_path, "learning_rate")
    assert rates[5] == pytest.approx(1e-4)  # a cosine of its own


def test_a_run_stopped_after_an_early_end_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    setting = {"curriculum": curriculum_of(8, stages=2), "epochs_per_stage": 5, "patience": 1}
    scores(monkeypatch, [10, 5, 20, 30, 40, 50, 60])
    whole = weights_of(train(tmp_path / "whole", **setting))
    scores(monkeypatch, [10, 5])
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", **setting)
    scores(monkeypatch, [20, 30, 40, 50, 60])
    assert same_bits(weights_of(train(tmp_path / "cut", **setting)), whole)


def test_a_continued_optimizer_and_learning_rate_do_not_begin_anew(tmp_path, monkeypatch):
    moments = {}

    def look(number, trainer, samples):
        optimizer = trainer.optimizer.optimizer
        moments[trainer.args.fresh_optimizer, number] = len(optimizer.state)

    for fresh in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            before_each_batch(patch, look)
            kept = {"fresh_optimizer": fresh, "fresh_learning_rate": fresh, "stage_weights": "last", "logging_steps": 1}
            train(tmp_path / str(fresh), curriculum=curriculum_of(8, stages=2), **kept)
    assert moments[True, 2] == 0 < moments[False, 2]
    assert [moments[True, n] > 0 for n in (1, 2, 3)] == [False, False, True]
    rates = [metrics(tmp_path / "False", "learning_rate")[n] for n in (1, 2, 3)]
    assert rates == pytest.approx([1e-4 * (1 + math.cos(math.pi * n / 3)) / 2 for n in range(3)])


def test_temperature_and_alpha_move_within_stages_where_asked(tmp_path, monkeypatch):
    seen = []
    before_each_batch(
        monkeypatch, lambda n, trainer, s: seen.append((trainer.objective.temperature, trainer.objective.alpha))
    )
    curriculum = curriculum_of(8, stages=2, temperatures=[1, 2], alphas=[0.4, 0])
    train(tmp_path, curriculum=curriculum, epochs_per_stage=2, within_stage="linear")
    assert seen == [(1, 0.4), pytest.approx((1.5, 0.2)), *[(2, 0)] * 4]


def test_without_a_curriculum_there_are_as_many_passes_in_one_stage(tmp_path):
    schedule = trainer_of(tmp_path, count=8, kind="none", epochs_per_stage=2, stages=4).planned()
    assert schedule.total_steps == 5 * 2  # 2 · (4 + 1) / 2 passes of two steps
    assert [(stage.size, stage.temperature, stage.alpha) for stage in schedule.stages] == [(8, 1.0, 0.3)]


def test_difficulty_is_measured_by_the_student_before_training_and_once(tmp_path):
    student = student_model()
    curriculum = trainer_of(tmp_path, count=8, student=student).planned().curriculum
    assert sorted(curriculum.order.tolist()) == list(range(8))
    assert [stage.size for stage in curriculum.stages] == [2, 4, 6, 8]
    assert (tmp_path / "difficulty.parquet").is_file()
    saved = Curriculum.load(tmp_path / "curriculum.json")
    assert saved.order.tolist() == curriculum.order.tolist()
    (tmp_path / "difficulty.parquet").unlink()
    assert trainer_of(tmp_path, count=8, student=student).planned().curriculum.order.tolist() == saved.order.tolist()
    for other in ({"count": 12, "student": student}, {"count": 8, "student": student_model(seed=5)}):
        with pytest.raises(InputError, match="the difficulty of other samples or of another student"):
            trainer_of(tmp_path, **other).planned()


def test_the_difficulty_is_measured_again_before_each_stage_where_asked(tmp_path):
    setting = {"curriculum": curriculum_of(8, stages=2), "learning_rate": 5e-2, "remeasure": True}
    trainer = trainer_of(tmp_path, **setting)
    trainer.train()
    again = Curriculum.load(tmp_path / "stage-2" / "curriculum.json")
    assert trainer.planned().subset(1).tolist() == again.order.tolist() != list(range(8))
    assert trainer.planned().subset(0).tolist() == [0, 1, 2, 3]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_budget_of_tokens_holds_through_orders_that_are_measured_anew(tmp_path):
    options = {"signals": "answer_length", "stages": 2, "epochs_per_stage": 2, "tokens_per_batch": 100}
    trainer = trainer_of(tmp_path, count=20, remeasure=True, **options)
    trainer.train()
    total = trainer.planned().total_steps
    assert trainer.state.global_step == trainer.state.max_steps == total
    assert (tmp_path / f"checkpoint-{total}").exists()


def test_without_a_curriculum_an_earlier_one_in_the_folder_is_not_taken(tmp_path):
    trainer_of(tmp_path, count=12, stages=3).planned()
    assert (tmp_path / "curriculum.json").exists()
    assert len(trainer_of(tmp_path, count=12, stages=3, kind="none").planned().stages) == 1


def test_a_budget_of_tokens_bounds_every_batch(tmp_path, monkeypatch):
    tokens = []
    before_each_batch(monkeypatch, lambda n, trainer, samples: tokens.append(sum(map(len, samples))))
    train(tmp_path, curriculum=curriculum_of(20, stages=1), tokens_per_batch=100)
    assert max(tokens) <= 100
    assert sum(tokens[:-1]) / (len(tokens) - 1) > 60  # a sample has about 30


def test_several_workers_prepare_the_same_batches(tmp_path):
    setting = {"curriculum": curriculum_of(12, stages=2), "learning_rate": 1e-3}
    one = train(tmp_path / "one", **setting)
    two = train(tmp_path / "two", **setting, dataloader_num_workers=1)
    assert same_bits(weights_of(one), weights_of(two))


# -- models and data ---------------------------------------------------------------------------------------------------


def test_everything_can_be_given_by_name_and_as_records(tmp_path):
    save_tiny(tmp_path / "teacher", layers=3, seed=1)
    save_tiny(tmp_path / "student", layers=2, seed=0)
    args = PoclConfig(output_dir=str(tmp_path / "out"), epochs_per_stage=1, stages=2, **FOUR)
    trainer = PoclTrainer(
        str(tmp_path / "student"), str(tmp_path / "teacher"), args, arithmetic(8, 0), eval_dataset=arithmetic(3, 50)
    )
    before = weights_of(trainer.model)
    result = trainer.train()
    assert result.global_step == 3
    assert not same_bits(before, weights_of(trainer.model))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_no_eval_dataset_means_no_evaluation_and_the_last_weights(tmp_path):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), dev=False)
    trainer.train()
    assert not metrics(tmp_path, "eval_rouge_l")
    assert not list(tmp_path.glob("stage-*-best-*"))
    with pytest.raises(InputError, match='stage_weights="best" needs evaluations'):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), dev=False, stage_weights="best")


SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**NARROW),
    "qwen2": Qwen2Config(**NARROW),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0),
    "gemma": GemmaConfig(**NARROW, head_dim=8),
    "gemma2": Gemma2Config(**NARROW, head_dim=8, final_logit_softcapping=5.0, layer_types=["full_attention"] * 2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_to_the_loss_of_its_own_forward(tmp_path, family, capsys):
    def model(seed):
        torch.manual_seed(seed)
        config = FAMILIES[family]
        config.initializer_range = 0.3
        return AutoModelForCausalLM.from_config(config).eval()

    student, teacher = model(0), model(1)
    logits = []
    curriculum = curriculum_of(4, stages=1, temperatures=[1.0], alphas=[0.5])
    setting = {"dev": False, "logging_steps": 1, "epochs_per_stage": 3, "learning_rate": 3e-3}
    trainer = trainer_of(tmp_path, curriculum=curriculum, student=student, teacher=teacher, **setting)
    total = torch.zeros(2)
    for sample in trainer.samples.encoded:
        ids, place = torch.tensor([sample.prompt_ids + sample.response_ids]), slice(len(sample.prompt_ids) - 1, -1)
        with torch.no_grad():
            logits = [one(input_ids=ids).logits[0, place].float().log_softmax(-1) for one in (student, teacher)]
        ce = -logits[0].gather(1, torch.tensor(sample.response_ids)[:, None]).sum()
        total += torch.stack([ce, (logits[1].exp() * (logits[1] - logits[0])).sum()])
    trainer.train()
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    tokens = sum(len(sample.response_ids) for sample in trainer.samples.encoded)
    assert losses[0] == pytest.approx(0.5 * float(total.sum()) / tokens, rel=1e-3)  # the cache is bf16
    assert losses[-1] < losses[0]
    assert ("does not support packed batches" in capsys.readouterr().out) == (not trainer.packed)


# rotary positions have no end
@pytest.mark.parametrize(
    ("positions", "refused"),
    [((64, 64), None), ((16, 64), "student has learned 16"), ((64, 16), "teacher has learned 16")],
)
def test_samples_longer_than_learned_positions_are_refused_before_anything_is_computed(tmp_path, positions, refused):
    student, teacher = (
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=n))
        for n in positions
    )
    setting = {"student": student, "teacher": teacher, "curriculum": curriculum_of(4, stages=1), "dev": False}
    if refused is None:
        trainer_of(tmp_path, **setting)
        rotary = AutoModelForCausalLM.from_config(LlamaConfig(**NARROW, max_position_embeddings=16))
        trainer_of(tmp_path, **setting | {"student": rotary})
    else:
        with pytest.raises(InputError, match=refused):
            trainer_of(tmp_path, **setting)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "lm_head"])
def test_adapters_are_trained_and_nothing_else(tmp_path, targets):
    peft = pytest.importorskip("peft")
    student = tiny_model(layers=2, seed=0, tied=False).float()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    setting = {"epochs_per_stage": 4, "learning_rate": 1e-2, "stage_weights": "last"}
    trainer = trainer_of(
        tmp_path, curriculum=curriculum_of(16, stages=1), student=student, peft_config=config, **setting
    )
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(bool(p.any()) for p in trained.values())  # B starts at zero
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        module, kind = name.rsplit(".", 1)
        now = after.get(name, after.get(f"{module}.base_layer.{kind}"))
        assert torch.equal(now, value)
    losses = metrics(tmp_path, "loss")
    assert losses[16] < 0.97 * losses[1]


def test_adapters_on_the_lm_head_have_the_gradient_of_torch(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_of(
        tmp_path,
        curriculum=curriculum_of(4, stages=1, temperatures=[1.0], alphas=[1.0]),
        student=tiny_model(layers=2, seed=0, tied=False).float(),
        peft_config=config,
    )
    model = trainer.model
    trainer.objective = Objective(alpha=1.0)
    batch = trainer.get_train_dataloader().dataset[0, 0]
    trainer.compute_loss(model, batch).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    total = torch.zeros(())
    for sample in batch["samples"]:
        logits = model(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
        labels = torch.tensor(sample.response_ids)
        total = total + torch.nn.functional.cross_entropy(
            logits[len(sample.prompt_ids) - 1 : -1], labels, reduction="sum"
        )
    (total / len(batch["packed"].labels)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)


def test_losses_and_scores_go_where_report_to_says(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), report_to="tensorboard").train()
    [events] = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    tags = set(EventAccumulator(str(events)).Reload().Tags()["scalars"])
    assert {"train/loss", "train/divergence", "train/temperature", "train/stage", "eval/rouge_l"} <= tags


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .*; got 'kl'"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"num_train_epochs": 3}, "give epochs_per_stage"),
        ({"load_best_model_at_end": True}, 'stage_weights="best"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not for this trainer"),
        ({"auto_find_batch_size": True}, "halved by itself"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen"),
        ({"eval_delay": 2}, "eval_delay"),
        ({"torch_compile": True}, "compiled again"),
        ({"save_strategy": "best"}, "the best weights are kept anyway"),
        ({"remeasure": True, "dataloader_num_workers": 2}, "dataloader_num_workers=0"),
        ({"patience": 2, "eval_strategy": "no"}, "patience needs evaluations"),
        ({"skew": 1.5}, "skew must be above 0 and below 1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of stop, skip"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PoclConfig(output_dir=str(tmp_path), **options)


def test_a_command_line_parses_into_the_arguments(tmp_path):
    parser = HfArgumentParser(PoclConfig)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--divergence", "jsd", "--temperature", "1", "3"]
    [args] = parser.parse_args_into_dataclasses([*words, "--report_to", "none"])
    assert (args.divergence, args.temperature, args.report_to) == ("jsd", [1.0, 3.0], [])


def test_prompt_tuning_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="PromptTuningConfig puts tokens before the prompt"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), peft_config=config)


def test_the_paper_preset_is_the_papers_recipe(tmp_path):
    args = PoclConfig.preset("paper", str(tmp_path), divergence="reverse_kl", use_cpu=True)
    assert (args.stages, args.epochs_per_stage, args.learning_rate, args.weight_decay) == (4, 8, 1e-4, 0.01)
    assert (args.temperature, args.alpha) == ([1.0, 1.33, 1.67, 2.0], [0.3, 0.2, 0.1, 0.0])
    assert args.objective().temperature_power == 0  # the code does not scale reverse KL
    assert PoclConfig.preset("paper", str(tmp_path), use_cpu=True).objective().temperature_power == 2
    assert args.stages * args.epochs_per_stage * (1 + args.stages) / (2 * args.stages) == 20  # passes over all samples
    with pytest.raises(ValueError, match="there is paper"):
        PoclConfig.preset("pape", str(tmp_path))


def test_a_learning_rate_schedule_that_needs_scores_is_refused(tmp_path):
    with pytest.raises(InputError, match="depends on more than the step"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), lr_scheduler_type="reduce_lr_on_plateau").train()


def test_only_the_model_is_uploaded(tmp_path, monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, *_, **__):
            return type("Url", (), {"repo_id": "someone/student"})

        def upload_folder(self, folder_path, **_):
            uploaded.append(sorted(path.name for path in Path(folder_path).rglob("*")))
            done = Future()
            done.set_result(type("Commit", (), {"is_done": lambda _: True}))
            done.is_done = done.done
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = trainer_of(
        tmp_path,
        curriculum=curriculum_of(8, stages=1),
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(uploaded) >= 2
    for names in uploaded:
        assert "model.safetensors" in names
        assert not {"teacher_cache", "metrics.jsonl", "difficulty.parquet"} & set(names)
        assert not any("best" in name or "checkpoint" in name for name in names)


def test_evaluating_something_else_on_the_way_changes_nothing_of_the_training(tmp_path):
    class Also(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            other = SampleSet(*encoded_samples(2, start=100))
            found.append(trainer.evaluate(other, metric_key_prefix="test"))
            trainer.evaluate(other)

    found = []
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), patience=1, callbacks=[Also()])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "test_rouge_l" in found[0]
    assert {best.step for best in trainer.progress.best.values()} == {2}


def test_the_teacher_may_be_a_plain_model(tmp_path):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), teacher=teacher_model())
    trainer.train()
    assert list((tmp_path / "teacher_cache").iterdir())
