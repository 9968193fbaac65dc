"""Options: names, types, ranges, and what wins over what."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_run import make_inputs, options, read_json, refusal, run
from transformers import HfArgumentParser

from pocl_fast.loss.objective import DIVERGENCES, SCALINGS
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import LossOptions
from pocl_fast.settings.configuration import from_options, read_yaml, recorded_config, to_yaml
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import hints_of
from pocl_fast.training.arguments import PAPER, PoclConfig


def test_yaml_holds_every_option_and_reads_back_as_the_same_configuration(tmp_path):
    given = {
        "teacher": "org/model",
        "train": "a folder/with: odd #name.jsonl",
        "batch-size": 3,
        "learning_rate": 5e-5,
        "temperature": [1, 1.5, 3],
        "eval_seeds": [7],
        "trust_remote_code": True,
    }
    config = from_options(given)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    lines = path.read_text().splitlines()
    for name in RunConfig().flat():
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
    assert read_yaml(path) == config
    assert config.data.train == "a folder/with: odd #name.jsonl"
    assert config.schedule.temperature == [1.0, 1.5, 3.0]
    assert config.optimisation.per_device_train_batch_size == 3
    assert config.optimisation.learning_rate == 5e-5


def test_the_defaults_are_the_papers_but_for_pacing_temperature_alpha_and_restarts():
    config = RunConfig()
    training, schedule, data = config.optimisation, config.schedule, config.data
    assert config.stages.epochs_per_stage == 8
    assert (training.per_device_train_batch_size, training.learning_rate) == (16, 1e-4)
    assert (training.weight_decay, training.max_grad_norm) == (0.01, 1.0)
    assert (schedule.stages, schedule.rrf_k, schedule.temperature, schedule.alpha) == (4, 60.0, [1, 1], [0.3, 0.3])
    assert (schedule.pacing, schedule.initial_competence, schedule.full_competence) == ("auto", 0.4, 0.3)
    assert (config.stages.fresh_optimizer, config.stages.fresh_learning_rate) == (False, False)
    assert (data.max_length, data.max_prompt_length) == (512, 256)
    assert config.evaluation.eval_seeds == [10, 20, 30, 40, 50]


# name and value of an option, and what the message says after its name
WRONG = [
    ("batch_size", 0, " must be at least 1, got 0"),
    ("batch_size", "many", " must be an integer, got 'many'"),
    ("batch_size", 1.5, " must be an integer, got 1.5"),
    ("batch_size", True, " must be an integer, got True"),
    ("learning_rate", -1, " must be above 0, got -1"),
    ("learning_rate", float("nan"), " must be above 0, got nan"),
    ("weight_decay", -0.1, " must be at least 0, got -0.1"),
    ("stages", 0, " must be at least 1, got 0"),
    ("rrf_k", 0, " must be above 0, got 0"),
    ("seed", -1, " must be at least 0 and below 2147483648, got -1"),
    ("skew", 1, " must be above 0 and below 1, got 1"),
    ("lmbda", 1.5, " must be at least 0 and at most 1, got 1.5"),
    ("eval_seeds", [], " must have at least one value, got none"),
    ("eval_seeds", [1, "two"], ", value 2, must be an integer, got 'two'"),
    ("temperature", 1.0, " must be a list, got 1.0"),
    ("temperature", [], " must have at least one value, got none"),
    ("temperature", ["hot"], ", value 1, must be a number, got 'hot'"),
    ("report_to", [3], ", value 1, must be text, got 3"),
    ("divergence", "kl", " must be one of forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd;"),
    ("divergence", "foward_kl", "got 'foward_kl' (did you mean forward_kl"),
    ("long_prompts", "cut", " must be one of error, skip, truncate-left; got 'cut'"),
    ("trust_remote_code", "perhaps", " must be true or false, got 'perhaps'"),
    ("patience", "never", " must be an integer, got 'never'"),
]


@pytest.mark.parametrize(
    ("name", "value", "says"), [*WRONG, ("teacher", 3, "text, got 3"), ("train", 3, "text, got 3")]
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_named(name, value, says):
    with pytest.raises(InputError) as error:
        from_options({name: value})
    assert str(error.value).startswith("--" + name.replace("_", "-"))
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "value", "says"), WRONG)
def test_the_trainers_arguments_refuse_the_same_values_with_the_same_words(tmp_path, name, value, says):
    name = "per_device_train_batch_size" if name == "batch_size" else name
    with pytest.raises(InputError) as error:
        PoclConfig(output_dir=str(tmp_path), **{name: value})
    assert str(error.value).startswith(name)
    assert says in str(error.value)


def test_every_unknown_option_is_named_at_once_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"options batchsize \(did you mean .*\bbatch_size\b.*\), lr; known are teacher, "
    ):
        from_options({"lr": 1, "batchsize": 2, "stages": 3})


def test_an_unknown_name_among_the_trainers_arguments_is_named_with_its_neighbours(tmp_path):
    said = r"unknown arguments batch_size \(it is per_device_train_batch_size here\), epochs_per_stge \(did you mean"
    with pytest.raises(InputError, match=said):
        PoclConfig(output_dir=str(tmp_path), batch_size=2, epochs_per_stge=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: [1", "is not YAML"),
        ("- stages", "expected options as `name: value` lines, got a list"),
        ("stage: 4", "unknown option stage (did you mean stages"),
        ("stages: four", "--stages must be an integer"),
    ],
)
def test_a_wrong_yaml_file_is_named_in_the_message(tmp_path, capsys, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    said = refusal(capsys, "distill", tmp_path / "out", "--config", str(path))
    assert str(path) in said
    assert says in said
    assert not (tmp_path / "out").exists()


def test_an_empty_yaml_file_is_the_defaults_and_a_missing_one_an_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == RunConfig()
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_the_command_line_wins_over_yaml_over_what_was_recorded_over_the_default(tmp_path):
    inputs = make_inputs(tmp_path)
    output, mine = tmp_path / "out", tmp_path / "mine.yaml"
    given = options(inputs, generation_batch_size=8, max_new_tokens=4)
    assert run("measure", output, *given[: given.index("--epochs-per-stage")], "--device", "cpu") == 0
    mine.write_text("stages: 3\nrrf_k: 20\nbatch-size: 5\npacing: baby-steps\n")
    assert run("rank", output, "--config", str(mine), "--stages", "2") == 0
    config = recorded_config(output)
    assert config.schedule.stages == 2  # command line
    assert config.schedule.rrf_k == 20  # YAML
    assert config.optimisation.per_device_train_batch_size == 5  # YAML, kept for the step that it is of
    assert config.generation.max_new_tokens == 4  # recorded by measure
    assert config.optimisation.weight_decay == 0.01  # default
    stages = read_json(output / "curriculum.json")["stages"]
    assert [stage["size"] for stage in stages] == [12, 24]


def test_the_page_of_options_is_what_is_declared():
    place = Path(__file__).parents[1] / "docs" / "options_page.py"
    spec = importlib.util.spec_from_file_location("options_page", place)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "write it again: make docs"
    text = generator.page()
    for name in RunConfig().flat():
        assert text.count(f"| `--{name.replace('_', '-')}` |") == 1
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100


def test_a_fields_docstring_is_its_help():
    for group in fields(RunConfig):
        for option in fields(getattr(RunConfig(), group.name)):
            assert len(option.metadata["help"].split()) > 3, option.name
            assert "%" not in option.metadata["help"]  # argparse formats it
    assert LossOptions.__dataclass_fields__["beta"].metadata["help"] == "The teacher's weight in jsd."


def test_the_four_readers_have_the_same_defaults(tmp_path):
    expected = RunConfig().trainer_options()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunConfig()), encoding="utf-8")
    assert read_yaml(path).trainer_options() == expected
    [parsed] = HfArgumentParser(PoclConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    [from_dict] = HfArgumentParser(PoclConfig).parse_dict({"output_dir": str(tmp_path), "use_cpu": True})
    for args in (parsed, from_dict, PoclConfig(str(tmp_path), use_cpu=True)):
        settled = {"device": torch.device("cpu"), "report_to": []}  # what transformers makes of "auto" and ["none"]
        assert {name: getattr(args, name) for name in expected} == expected | settled


def test_the_command_lines_parser_of_transformers_reads_lists_choices_and_the_short_name(tmp_path):
    words = "--use_cpu --divergence jsd --temperature 1 3 --eval_seeds 1 2 --batch-size 3 --activation_checkpointing"
    [args] = HfArgumentParser(PoclConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words.split()])
    assert (args.divergence, args.temperature, args.eval_seeds) == ("jsd", [1.0, 3.0], [1, 2])
    assert (args.per_device_train_batch_size, args.activation_checkpointing) == (3, True)


@pytest.mark.parametrize("name", ["wandbb", "wandb"])
def test_a_place_to_report_to_must_be_known_and_installed(tmp_path, name):
    if name == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("it is installed")
    with pytest.raises(InputError, match=r"report_to .*'wandb"):
        PoclConfig(str(tmp_path), report_to=name)


def test_the_divergences_are_those_of_the_loss():
    assert get_args(hints_of(LossOptions)["divergence"]) == DIVERGENCES
    assert set(get_args(hints_of(LossOptions)["temperature_scaling"])) == {*SCALINGS, PAPER}


def test_two_spellings_of_an_option_in_a_file_are_refused(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("batch-size: 3\nper_device_train_batch_size: 4\n")
    with pytest.raises(InputError, match="batch-size and per_device_train_batch_size are the same option"):
        read_yaml(path)
