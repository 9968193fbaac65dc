"""What is given as a model, a tokenizer or adapters is one of these and can be saved, or is refused at once."""

import copy

import peft
import pytest
import torch
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer
from tiny_run import make_inputs, options, refusal, run, select
from tiny_training import curriculum_of, trainer_of
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from pocl_fast.inputs.left_to_right import check_left_to_right
from pocl_fast.models.loading import load_model, load_tokenizer, make_savable
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = BertConfig(**SMALL, intermediate_size=48)
T5 = T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)


def empty_model():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model().config)


def trainer(folder, *, model=None, teacher=None, tokenizer=None, train=None, dev=None, **given):
    settings = {"use_cpu": True, "precision": "fp32", "curriculum": "none"} | given.pop("settings", {})
    return PoclTrainer(
        tiny_model(layers=1).float() if model is None else model,
        tiny_model(layers=2, seed=1) if teacher is None else teacher,
        given.pop("args", None) or PoclConfig(str(folder), **settings),
        arithmetic(4) if train is None else train,
        dev,
        tiny_tokenizer() if tokenizer is None else tokenizer,
        **given,
    )


# -- kinds -------------------------------------------------------------------------------------------------------------

NO_MODELS = {
    "a configuration": (lambda: tiny_model().config, "is a LlamaConfig, and no model"),
    "a class": (lambda: AutoModelForCausalLM, "is the class AutoModelForCausalLM, and no model of it"),
    "weights": (lambda: tiny_model().state_dict(), "is a OrderedDict, and no model"),
    "a plain module": (lambda: torch.nn.Linear(2, 2), "is a Linear, and no model of transformers"),
    "a body alone": (lambda: LlamaModel(tiny_model().config), "is a LlamaModel, which has no lm_head"),
    "an encoder": (lambda: BertForMaskedLM(BERT), "is a BertForMaskedLM that also looks at later tokens"),
    "an encoder with a causal name": (lambda: BertLMHeadModel(BERT), "also looks at later tokens"),
    "encoder and decoder": (lambda: T5ForConditionalGeneration(T5), "which has an encoder of its own"),
    "no weights": (empty_model, r"has no weights in memory: model.embed_tokens.weight and 1\d more are on the meta"),
}


@pytest.mark.parametrize("argument", ["model", "teacher"])
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_causal_language_model_is_refused_by_its_argument(tmp_path, argument, kind):
    make, says = NO_MODELS[kind]
    with pytest.raises(InputError, match=says) as error:
        trainer(tmp_path, **{argument: make()})
    assert str(error.value).startswith(f"{argument} ")
    assert not (tmp_path / "teacher_cache").exists()


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (lambda: "some/model", r"processing_class is a str, .* AutoTokenizer.from_pretrained\('some/model'\)"),
        (lambda: type("Processor", (), {"tokenizer": 1})(), "a Processor, .* processing_class=processor.tokenizer"),
        (lambda: tiny_tokenizer().backend_tokenizer, "a Tokenizer, .*PreTrainedTokenizerFast"),
        (
            lambda: type(tiny_tokenizer()),
            r"is a \w+, and no tokenizer of transformers: give the tokenizer that belongs",
        ),
    ],
    ids=["a name", "a processor", "a backend", "a class"],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, tokenizer, says):
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 4}, "peft_config is a dict, and no configuration of peft"),
        (peft.LoraConfig(target_modules=["nowhere"]), r"LlamaForCausalLM has no layer nowhere \(target_modules\)"),
        (peft.LoraConfig(task_type="SEQ_CLS"), "peft_config is for task_type SEQ_CLS: .* needs CAUSAL_LM"),
    ],
    ids=["a dict", "no such layer", "another task"],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, config, says):
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, peft_config=config)


def test_adapters_on_top_of_adapters_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="the model has adapters already"):
        trainer(tmp_path, model=peft.get_peft_model(tiny_model(), config), peft_config=config)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"args": TrainingArguments("out", use_cpu=True)}, "args is a TrainingArguments: give a PoclConfig"),
        ({"curriculum": "curriculum.json"}, "curriculum is a str: give a Curriculum, as Curriculum.load"),
        ({"callbacks": TrainerCallback()}, "callbacks must be a list"),
        ({"optimizers": None}, "optimizers must be a pair"),
        ({"teacher": Teacher}, "teacher is the class Teacher, and no Teacher"),
        ({"settings": {"eval_strategy": "steps"}}, 'eval_strategy="steps" needs samples: give eval_dataset'),
        ({"settings": {"student_layers": 1}}, "student_layers=1 cuts a student that is given by name"),
        ({"settings": {"teacher_quantization": "4bit"}}, "teacher_quantization='4bit' is for a teacher that is given"),
        ({"settings": {"teacher_device": "spread"}}, "teacher_device='spread' is for a teacher that is given by name"),
        ({"settings": {"teacher_device": "gpu"}}, "teacher_device gpu: not a device .* or give student .*, or spread"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_refused(tmp_path, given, says):
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, **given)


def test_a_quantised_student_needs_adapters(tmp_path):
    pytest.importorskip("bitsandbytes")
    student = load_model(str(save_tiny(tmp_path / "model", hidden=64)), quantization="8bit")
    with pytest.raises(InputError, match="model is quantised: only adapters on it can learn, so give a peft_config"):
        trainer(tmp_path / "out", model=student)


@pytest.mark.parametrize("argument", ["model", "teacher"])
def test_what_needs_more_than_tokens_is_refused_by_its_argument(tmp_path, argument):
    model = tiny_model(layers=1)

    def forward(**given):
        raise RuntimeError("give pixel_values\nand more")

    model.forward = forward
    says = rf"{argument} is a LlamaForCausalLM that does not run on tokens alone \(RuntimeError: give pixel_values\)"
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, **{argument: model})


def test_modes_and_special_tokens_are_left_alone_by_the_check():
    model = tiny_model(layers=1)
    model.config.image_token_id = 3
    model.train()
    model.model.layers[0].mlp.eval()
    before, seen = [module.training for module in model.modules()], []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    check_left_to_right(model, "model")
    assert [module.training for module in model.modules()] == before
    assert seen
    assert not any((ids == 3).any() for ids in seen)


def test_names_may_be_paths(tmp_path):
    save_tiny(tmp_path / "student", layers=1)
    save_tiny(tmp_path / "teacher", layers=2, seed=1)
    made = trainer(tmp_path / "out", model=tmp_path / "student", teacher=tmp_path / "teacher")
    assert made.teacher.vocab_size == 259


def test_an_encoder_by_name_is_refused_on_the_command_line(tmp_path, capsys):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    BertLMHeadModel(BERT).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    words = options(inputs, student=tmp_path / "bert", student_layers=None)
    said = refusal(capsys, "distill", tmp_path / "out", *words)
    assert "--student is a BertLMHeadModel that also looks at later tokens" in said


# -- what can be saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},  # Vicuna's, Llama 2's
        {"do_sample": None, "top_k": 20, "typical_p": 0.5},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    ],
    ids=["temperature", "top-k", "beams"],
)
def test_a_generation_config_that_is_not_saved_is_repaired_and_said(tmp_path, capsys, settings):
    student = tiny_model(layers=1).float()
    for name, value in settings.items():
        setattr(student.generation_config, name, value)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        copy.deepcopy(student).save_pretrained(tmp_path / "before")
    made = trainer_of(tmp_path, count=4, curriculum=curriculum_of(4, stages=1), student=student)
    said = [line for line in capsys.readouterr().out.splitlines() if "generation_config has" in line]
    assert len(said) == 1
    assert all(name in said[0] for name in settings if name not in ("do_sample", "num_beams"))
    if "temperature" in settings:
        made.train()
    made.save_model(str(tmp_path / "saved"))
    assert load_model(str(tmp_path / "saved")).generation_config.eos_token_id == 258


def spoilt(student, what):
    if what == "generation":
        student.generation_config.early_stopping = "sometimes"
    elif what == "settings":
        student.config.extra = torch.nn.Identity()
    else:
        student.model.layers[1].mlp.up_proj.weight = student.model.layers[0].mlp.up_proj.weight
    return student


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("generation", "generation_config is none that transformers saves: .*early_stopping"),
        ("settings", "the student's LlamaConfig cannot be saved: .*JSON"),
        ("weights", "layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, what, says):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        spoilt(tiny_model().float(), what).save_pretrained(tmp_path / "it does fail")
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, model=spoilt(tiny_model().float(), what))


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["extra"] = torch.nn.Identity()
    with pytest.raises(TypeError):
        tokenizer.save_pretrained(tmp_path / "it does fail")
    with pytest.raises(InputError, match=r"the tokenizer cannot be saved: .*JSON"):
        trainer(tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_ends_are_tied_or_not_can_be_saved(tied):
    said = []
    make_savable(tiny_model(tied=tied), said.append)
    assert said == []


def test_a_run_repairs_the_generation_config_of_its_student(tmp_path, capsys):
    inputs = make_inputs(tmp_path, train=4, dev=2)
    path = inputs / "teacher" / "generation_config.json"
    path.write_text(path.read_text().replace("{", '{"do_sample": false, "temperature": 0.9,', 1))
    assert run("measure", tmp_path / "out", *select(options(inputs), "measure")) == 0
    assert capsys.readouterr().out.count("the student's generation_config has temperature 0.9") == 1


# -- adapters as a source ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """A folder of adapters for the model in `base`, and the logits of both together."""
    base = load_model(str(save_tiny(tmp_path / "base")))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", adapted(torch.arange(9)[None]).logits


def test_a_folder_of_adapters_is_its_model_with_the_adapters_merged(adapter, capsys):
    folder, want = adapter
    model = load_model(str(folder))
    torch.testing.assert_close(model(torch.arange(9)[None]).logits, want, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert f"the adapters {folder} are merged into {folder.parent / 'base'}" in capsys.readouterr().out
    assert load_tokenizer(str(folder)).eos_token == "<|end|>"


def test_adapters_beside_their_model_are_merged_too(adapter):
    folder, want = adapter
    for path in folder.iterdir():
        path.rename(folder.parent / "base" / path.name)
    model = load_model(str(folder.parent / "base"))
    torch.testing.assert_close(model(torch.arange(9)[None]).logits, want, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_a_run_distils_from_adapters_and_knows_when_they_change(adapter, tmp_path):
    from pocl_fast.models.fingerprints import source_fingerprint

    folder, _ = adapter
    before = source_fingerprint(str(folder))
    assert source_fingerprint(str(folder)) == before
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert source_fingerprint(str(folder)) != before
    base = folder.parent / "base" / "model.safetensors"
    changed = source_fingerprint(str(folder))
    base.write_bytes(base.read_bytes()[:-1] + b"\x01")
    assert source_fingerprint(str(folder)) != changed


def test_adapters_for_a_model_of_another_size_are_one_message(adapter):
    folder, _ = adapter
    save_tiny(folder.parent / "base", hidden=64)
    with pytest.raises(
        InputError, match=r"cannot load the model '.*adapter': its adapters cannot be merged into"
    ) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_adapters_without_their_model_or_without_peft_say_what_to_do(adapter, monkeypatch):
    folder, _ = adapter
    (folder.parent / "base").rename(folder.parent / "moved")
    with pytest.raises(InputError, match=r"the adapter .* is for the model .*base, which is not there: set base_mod"):
        load_model(str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"holds adapters, which peft loads: pip install .*, or merge them"):
        load_model(str(folder))
