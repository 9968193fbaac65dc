"""Every option, set to a value that is not its default, reaches what it is for: the model that is loaded, the samples
that are read, the file that is written. An option without such a test fails the last ones. Those of answers are in
test_options_reach_answers.py, and what only a training shows in test_options_reach_training.py."""

import importlib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import CHAT_TEMPLATE, arithmetic, save_tiny, tiny_model, tiny_tokenizer, write_jsonl
from tiny_options import CHANGED, SHOWN, reaches
from tiny_training import curriculum_of

from pocl_fast.data import sample_set
from pocl_fast.options.data import ModelNames
from pocl_fast.options.run import RunConfig, RunModels, TrainerArguments
from pocl_fast.run import train_step
from pocl_fast.settings.configuration import from_options
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig


class Loaded(Exception):
    pass


@pytest.fixture
def loads(monkeypatch):
    """Collects what transformers is asked to load, and loads a tiny model."""
    asked = []

    def from_pretrained(source, **settings):
        asked.append(SimpleNamespace(source=str(source), **settings))
        if "quantization_config" in settings:
            raise Loaded
        return tiny_model(layers=4)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer())
    return asked


# -- models ------------------------------------------------------------------------------------------------------------


@reaches("teacher", "student", "trust_remote_code")
def test_the_two_models_are_loaded_by_their_names_with_their_code(changed, run_of, loads):
    context = run_of(**changed).context
    context.teacher_model()
    context.student()
    assert [(one.source, one.trust_remote_code) for one in loads] == [("the/teacher", True), ("the/student", True)]


@reaches("student_layers")
def test_the_student_has_as_many_layers_as_are_kept(changed, run_of):
    assert len(run_of(**changed).context.student().model.model.layers) == 3


@reaches("layer_choice")
def test_the_student_has_the_layers_of_the_choice(changed, run_of, tmp_path):
    teacher = tiny_model(layers=4)
    for layer in (0, 3):  # which add nothing, and are the even choice of two
        teacher.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        teacher.model.layers[layer].mlp.down_proj.weight.data.zero_()
    teacher.save_pretrained(tmp_path / "idle")
    tiny_tokenizer().save_pretrained(tmp_path / "idle")
    for folder, choice, layers in (("plain", {}, (0, 3)), ("chosen", changed, (1, 2))):
        student = run_of(folder, teacher=str(tmp_path / "idle"), **choice).context.student().model
        for new, old in enumerate(layers):
            weights = [model.model.layers[i].mlp.up_proj.weight for model, i in ((student, new), (teacher, old))]
            assert torch.equal(*weights)


@reaches("teacher_quantization")
def test_the_teacher_is_loaded_in_8_bits(changed, run_of, loads):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(Loaded):
        run_of(**changed).context.teacher_model()
    assert loads[-1].quantization_config.load_in_8bit


@reaches("teacher_device")
def test_the_teacher_is_on_its_own_device(changed, run_of):
    context = run_of(**changed).context
    assert (context.device.type, context.teacher_model().device.type) == ("cpu", "meta")


@reaches("device")
def test_models_are_loaded_to_the_device_and_a_trainer_trains_on_it(changed, run_of, tmp_path):
    assert run_of(**changed).context.teacher_model().device.type == "meta"
    with pytest.raises(InputError, match="device 'meta': transformers trains on "):
        PoclConfig(str(tmp_path), **changed)
    on_cpu = PoclConfig(str(tmp_path), device="cpu")
    assert (on_cpu.device, on_cpu.use_cpu, on_cpu.to_dict()["device"]) == (torch.device("cpu"), True, "cpu")
    with pytest.raises(InputError, match="device 'meta' and use_cpu=True contradict each other"):
        PoclConfig(str(tmp_path), use_cpu=True, **changed)


@reaches("precision")
def test_models_run_in_the_precision(changed, run_of, monkeypatch):
    modes = []
    monkeypatch.setattr("pocl_fast.models.precision.set_fp32_products", modes.append)
    for precision in ("fp32", changed["precision"]):
        assert run_of(precision, precision=precision).context.precision.name == precision
    if modes:  # a CPU
        assert modes[-1] == "bf16"


# -- samples -----------------------------------------------------------------------------------------------------------


@reaches("train", "dev", "test")
def test_samples_are_read_from_the_files(changed, run_of, inputs):
    given = {name: {one: inputs / file for one, file in changed[name].items()} for name in ("dev", "test")}
    context = run_of(train=inputs / changed["train"], **given).context
    assert [s.references[0] for s in context.train_set.samples] == ["0", "1 1", "2 2 2"]
    assert [s.references[0] for s in context.dev_set.samples] == ["50 50 50", "51 51 51 51"]
    sets = [(one.named.role, one.named.name, len(one.data.encoded)) for one in context.evaluation_sets]
    assert sets == [("dev", "two", 2), ("test", "others", 3), ("test", "more", 2)]


@reaches("fields", "bad_records")
def test_fields_have_other_names_and_bad_records_are_left_out(changed, run_of, trainer_with, tmp_path, capsys):
    records = [{"question": one["instruction"], "answers": {"text": one["output"]}} for one in arithmetic(6)]
    records[1] |= {"answers": {"text": 3}}
    train = write_jsonl(tmp_path / "named.jsonl", records)
    samples = run_of(train=train, **changed).context.train_set.samples
    assert [(sample.index, sample.line) for sample in samples] == [(0, 1), (1, 3), (2, 4), (3, 5), (4, 6)]
    assert f"{train}: 5 samples; 1 bad record left out: not text 1 (line 2)" in capsys.readouterr().out
    trainer_with(changed, given=False).evaluate(records)
    assert "eval_dataset: 5 samples; 1 bad record left out: not text 1 (record 2)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r'line 2: field "output" must be a string, got int.*"answers\.text"'):
        _ = run_of("strict", train=train, fields=changed["fields"]).context.train_set
    with pytest.raises(InputError, match="--fields instruction=question: there is no field"):
        _ = run_of("plain", fields=changed["fields"]).context.train_set


@reaches("template")
def test_prompts_are_in_the_template(changed, run_of):
    context = run_of(max_length=400, max_prompt_length=300, **changed).context
    assert "### Instruction" in context.tokenizer.decode(context.train_set.encoded[0].prompt_ids)


@reaches("chat_template", "chat_template_kwargs", "system_prompt")
def test_prompts_are_in_the_chosen_chat_template_with_its_variables_and_the_system_prompt(changed, run_of, tmp_path):
    teacher, tokenizer = save_tiny(tmp_path / "teacher", layers=4), tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "kind": "({{ tone }})" + CHAT_TEMPLATE}
    tokenizer.save_pretrained(teacher)
    run = run_of(teacher=str(teacher), max_length=160, max_prompt_length=120, stages=1, epochs_per_stage=1, **changed)
    context = run.context
    prompt = context.tokenizer.decode(context.train_set.encoded[0].prompt_ids)
    assert prompt.startswith("(warm)<|start|>system\nBe brief.<|end|>\n<|start|>user\nSay 0")
    run.measure()
    run.rank()
    run.train()  # the student is saved with the template that it was asked in
    saved = transformers.AutoTokenizer.from_pretrained(run.path / "student")
    assert saved.get_chat_template() == "({{ tone }})" + CHAT_TEMPLATE


@reaches("train_on")
def test_the_last_answer_alone_is_trained_on(changed, run_of, tmp_path, monkeypatch):
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    train = write_jsonl(tmp_path / "talk.jsonl", [{"messages": turns}])
    read = sample_set.read_samples
    monkeypatch.setattr(
        sample_set, "read_samples", lambda *given, **how: [replace(one, earlier=(1,)) for one in read(*given, **how)]
    )
    counts = {}
    for which in (*changed.values(), "all"):
        [one] = run_of(which, train=train, max_length=200, train_on=which).context.train_set.encoded
        counts[which] = len(one.spans)
    assert counts == {"last": 1, "all": 2}


@reaches("reasoning")
def test_answers_are_trained_on_without_their_reasoning(changed, run_of, tmp_path):
    record = {"prompt": "a", "response": "<think>so</think>yes"}
    train = write_jsonl(tmp_path / "thinking.jsonl", [record])
    context = run_of(train=train, **changed).context
    assert context.tokenizer.decode(context.train_set.encoded[0].response_ids) == "yes<|end|>"
    assert context.train_set.samples[0].references == ("yes",)


@reaches("max_length", "max_prompt_length", "long_prompts")
def test_long_responses_are_cut_and_long_prompts_left_out(changed, run_of, tmp_path):
    records = arithmetic(3)
    records[0]["output"] = "b" * 100
    records[1]["instruction"] = "long " * 20
    train = write_jsonl(tmp_path / "long.jsonl", records)
    encoded = run_of(train=train, **changed).context.train_set.encoded
    assert [sample.index for sample in encoded] == [0, 2]
    assert len(encoded[0]) == 60
    with pytest.raises(InputError, match="over --max-prompt-length 50 tokens"):
        _ = run_of("strict", train=train, **(changed | {"long_prompts": "error"})).context.train_set
    shortened = run_of("shortened", train=train, **(changed | {"long_prompts": "truncate-left"})).context.train_set
    assert [len(sample.prompt_ids) for sample in shortened.encoded][1] == 50
    assert len(shortened.samples[1].messages[0]["content"]) < len(records[1]["instruction"])


@reaches("special_tokens")
def test_control_tokens_in_a_text_stay_text_or_become_tokens(changed, run_of, tmp_path, capsys):
    train = write_jsonl(tmp_path / "control.jsonl", [{"prompt": "Hi <|end|>", "response": "a <|end|> b"}] * 3)
    kept, parsed = run_of("kept", train=train), run_of(train=train, **changed)
    for run, ends in ((kept, 1), (parsed, 2)):
        one = run.context.train_set.encoded[0]
        assert one.response_ids.count(run.context.encoder.end_id) == ends
        assert one.prompt_ids.count(run.context.encoder.end_id) == ends
    assert capsys.readouterr().out.count("3 samples have control tokens in their text") == 1


@reaches("data_source")
def test_the_teachers_answers_replace_the_references(changed, run_of):
    context = run_of(**changed).context
    assert all(len(sample.response_ids) <= 3 for sample in context.train_set.encoded)  # two tokens and the end
    assert (context.path / "teacher_answers").is_dir()


# -- the cache ---------------------------------------------------------------------------------------------------------


@reaches("cache_mode", "cache_top_k")
def test_the_cache_keeps_the_teachers_best_tokens(changed, run_of):
    context = run_of(**changed).context
    sample = context.train_set.encoded[0]
    assert context.take_cached_teacher().top_k([sample]).indices.shape == (len(sample.response_ids), 5)


@reaches("cache_dtype")
def test_the_cache_keeps_hidden_states_in_8_bits(changed, run_of):
    run = run_of(**changed)
    run.cache()
    assert [folder.name.split("-", 1)[1] for folder in (run.path / "teacher_cache").iterdir()] == ["hidden-int8"]


# -- all of them -------------------------------------------------------------------------------------------------------


def test_a_run_gives_its_trainer_every_option(run_of, monkeypatch, tmp_path):
    # peft_config: lora_rank is given; the others: without a curriculum
    alone = ("device", "precision", "patience", "peft_config", "remeasure", "pacing")
    given = {name: value for name, value in CHANGED.items() if name not in alone}
    config = from_options(given | {"device": "cpu", "precision": "fp32"})
    args = PoclConfig.of_run(config, tmp_path)
    expected = config.trainer_options() | {"device": torch.device("cpu")}
    expected |= {"data_source": "data", "student_layers": None}  # which a run does before, and loads the teacher
    expected |= {"layer_choice": "even", "teacher_quantization": "none", "teacher_device": "student"}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.optim, args.lr_scheduler_type, args.gradient_checkpointing) == ("sgd", "linear", True)
    made = []
    monkeypatch.setattr("pocl_fast.training.trainer.PoclTrainer", lambda *given, **_: made.append(given[2]))
    run = run_of(learning_rate=3e-3, set={"optim": "sgd"})
    train_step.make_trainer(run.context, curriculum_of(6, stages=1), train_step.trainer_arguments(run.context))
    assert (made[0].learning_rate, made[0].optim, made[0].output_dir) == (3e-3, "sgd", str(run.path / "checkpoints"))


def test_every_option_is_shown_to_reach_what_it_is_for(monkeypatch):
    defaults = RunConfig().flat()
    for path in Path(__file__).parents[1].rglob("test_*.py"):  # tests are counted when pytest does not collect them too
        if "@reaches(" in path.read_text(encoding="utf-8"):
            monkeypatch.syspath_prepend(path.parent)
            importlib.import_module(path.stem)
    assert set(CHANGED) == SHOWN == set(defaults)
    assert not [name for name, value in CHANGED.items() if value == defaults[name]]


def test_a_trainer_has_every_option_but_those_that_it_is_given_as_arguments():
    own = {f.name for f in fields(PoclConfig)}
    lacks = {name for name in RunConfig().flat() if name not in own} - {"batch_size"}
    alone = {"warmup_epochs", "warmup_learning_rate"}  # warmup_steps of a trainer is transformers' own
    assert lacks == {"teacher", "student", "train", "dev", "test", "held_out", "score_teacher", "set"} | alone
    assert {f.name for f in fields(ModelNames)} <= {f.name for f in fields(RunModels)}
    assert [f.name for f in fields(TrainerArguments)] == ["set"]
