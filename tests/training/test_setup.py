"""Models and data as they can be given: names, records, families, adapters."""

from types import SimpleNamespace

import pytest
import torch
from tiny import PAPERS_STAGES, arithmetic, save_tiny, tiny_model, tiny_tokenizer
from tiny_training import curriculum_of, encoded_samples, same_bits, teacher_model, trainer_of, weights_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.loss.objective import Objective
from pocl_fast.models import loading
from pocl_fast.system.errors import InputError
from pocl_fast.training import given_teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.metrics import read_metrics
from pocl_fast.training.trainer import PoclTrainer

FOUR = PAPERS_STAGES | {"per_device_train_batch_size": 4, "use_cpu": True, "precision": "fp32", "max_new_tokens": 2}


def metrics(folder, name):
    return {r["step"]: r[name] for r in read_metrics(folder / "metrics.jsonl") if name in r}


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
    for sample in batch.samples:
        logits = model(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
        labels = torch.tensor(sample.response_ids)
        total = total + torch.nn.functional.cross_entropy(
            logits[len(sample.prompt_ids) - 1 : -1], labels, reduction="sum"
        )
    (total / len(batch.packed.labels)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)


def test_prompt_tuning_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="PromptTuningConfig puts tokens before the prompt"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), peft_config=config)


def test_the_teacher_may_be_a_plain_model(tmp_path):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), teacher=teacher_model())
    trainer.train()
    assert list((tmp_path / "teacher_cache").iterdir())


def test_a_student_by_name_is_cut_to_the_layers_of_the_options(tmp_path):
    save_tiny(tmp_path / "teacher", layers=4, seed=1)
    args = PoclConfig(output_dir=str(tmp_path / "out"), student_layers=2, **FOUR)
    name = str(tmp_path / "teacher")
    trainer = PoclTrainer(name, name, args, arithmetic(8, 0), curriculum=curriculum_of(8, stages=1))
    assert trainer.model.config.num_hidden_layers == len(trainer.model.model.layers) == 2
    assert trainer.teacher.config.num_hidden_layers == 4
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_student_by_name_has_the_layers_that_its_samples_choose_and_a_second_trainer_measures_none(
    tmp_path, monkeypatch, capsys
):
    source = tiny_model(layers=4, seed=1)
    source.model.layers[3].self_attn.o_proj.weight.data.zero_()
    source.model.layers[3].mlp.down_proj.weight.data.zero_()
    source.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    args = PoclConfig(output_dir=str(tmp_path / "out"), student_layers=3, layer_choice="importance", **FOUR)
    name = str(tmp_path / "teacher")
    for _ in range(2):
        trainer = PoclTrainer(name, name, args, arithmetic(8, 0), curriculum=curriculum_of(8, stages=1))
        for layer in range(3):
            kept, whole = (model.model.layers[layer].mlp.up_proj.weight for model in (trainer.model, source))
            assert torch.equal(kept, whole)
        monkeypatch.setattr("pocl_fast.cutting.layer_choice.block_influence", None)  # not callable
    assert capsys.readouterr().out.count("importance (0-2): held-out CE") == 1
    with pytest.raises(InputError, match="--layer-choice auto says which layers a cut student keeps"):
        PoclConfig(output_dir=str(tmp_path / "out"), layer_choice="auto")


@pytest.mark.parametrize("trust", [False, True])
def test_models_and_tokenizers_by_name_run_code_of_a_hub_model_only_where_that_is_allowed(tmp_path, monkeypatch, trust):
    save_tiny(tmp_path / "model", layers=2, seed=1)
    seen = []

    def watch(load):
        def watched(*args, **options):
            seen.append(options["trust_remote_code"])
            return load(*args, **options)

        monkeypatch.setattr(loading, load.__name__, watched)

    watch(loading.load_model)
    watch(loading.load_tokenizer)
    args = PoclConfig(output_dir=str(tmp_path / "out"), trust_remote_code=trust, **FOUR)
    name = str(tmp_path / "model")
    PoclTrainer(name, name, args, arithmetic(8, 0), curriculum=curriculum_of(8, stages=1))
    assert seen == [trust] * 4


def answered(monkeypatch, folder, answers, said):
    """The samples with these answers of a teacher, None for an empty one; what is said is appended to `said`."""
    samples = SampleSet(*encoded_samples(len(answers)))
    tokenizer = tiny_tokenizer()

    def generate(self, prompts, **_):
        texts = {sample.prompt_ids: text for sample, text in zip(samples.encoded, answers, strict=True)}
        return [tokenizer(texts[tuple(prompt)]).input_ids for prompt in prompts]

    monkeypatch.setattr("pocl_fast.answers.engine.TorchEngine.generate", generate)
    monkeypatch.setattr(given_teacher, "say", said.append)
    options = SimpleNamespace(max_new_tokens=8, max_length=96, generation_batch_size=4, generation_batch_tokens=4096)
    return given_teacher.answered_by_teacher(
        samples, tiny_model(), SampleEncoder(tokenizer), folder, fingerprint="t", options=options, student_rows=259
    )


def test_empty_answers_of_the_teacher_are_counted(monkeypatch, tmp_path):
    said = []
    made = answered(monkeypatch, tmp_path, ["yes", "", " \n", "no"], said)
    assert [made.samples[one.index].references for one in made.encoded] == [("yes",), ("",), ("",), ("no",)]
    assert len(made.encoded[1].response_ids) == 1  # its end
    assert said[-1].startswith(
        "the teacher's answer to 2 of 4 prompts is empty (records 2, 3): there the student learns"
    )
    said.clear()
    assert len(answered(monkeypatch, tmp_path / "all", ["a", "b"], said).encoded) == 2
    assert not any("is empty" in line for line in said)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": arithmetic(3), "b": arithmetic(3, 9)}, r"eval_dataset is a dict of several sets \(a, b\)"),
        (["a text"], "eval_dataset, record 1: expected a dict, got str"),
        (3, "eval_dataset holds no records"),
    ],
)
def test_a_dev_set_that_holds_no_records_says_what_to_give(tmp_path, given, says):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(4, stages=1))
    with pytest.raises(InputError, match=says):
        trainer.evaluate(given)


def test_a_dev_set_for_which_rouge_is_blind_is_called_so(tmp_path, capsys):
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(4, stages=1))
    trainer.evaluate([{"prompt": "问题", "response": "答案"}, {"prompt": "q", "response": "a"}])
    assert "eval_dataset: ROUGE-L is blind for 1 of 2 references" in capsys.readouterr().out


def test_samples_that_are_trained_on_and_scored_too_are_counted_before_training(tmp_path, capsys):
    args = PoclConfig(output_dir=str(tmp_path), **FOUR)
    PoclTrainer(
        tiny_model(),
        tiny_model(layers=3, seed=1),
        args,
        [*arithmetic(4), *arithmetic(2)],
        arithmetic(3, 2),
        tiny_tokenizer(),
    )
    said = capsys.readouterr().out
    assert "train_dataset: 2 of 6 samples are copies of others" in said
    assert "eval_dataset: 2 of 3 samples are among the training samples too: the student is trained on them" in said
