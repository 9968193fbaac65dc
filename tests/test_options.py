"""Options: names, types, ranges, and what wins over what."""

from dataclasses import fields
from pathlib import Path

import pytest
from tiny_run import make_inputs, options, read_json, refusal, run

from pocl_fast.options import RunConfig, from_options, read_yaml, recorded_config, to_yaml
from pocl_fast.system.errors import InputError


def every_option():
    return [option.name for group in fields(RunConfig) for option in fields(getattr(RunConfig(), group.name))]


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
    for name in every_option():
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
    assert read_yaml(path) == config
    assert config.data.train == Path("a folder/with: odd #name.jsonl")
    assert config.schedule.temperature == (1.0, 1.5, 3.0)
    assert (config.training.batch_size, config.training.learning_rate) == (3, 5e-5)


def test_the_defaults_are_the_papers():
    training, schedule, data = RunConfig().training, RunConfig().schedule, RunConfig().data
    assert (training.epochs_per_stage, training.batch_size, training.learning_rate) == (8, 16, 1e-4)
    assert (training.weight_decay, training.max_grad_norm) == (0.01, 1.0)
    assert (schedule.stages, schedule.rrf_k, schedule.temperature, schedule.alpha) == (4, 60.0, (1, 2), (0.3, 0))
    assert (data.max_length, data.max_prompt_length) == (512, 256)
    assert RunConfig().evaluation.eval_seeds == (10, 20, 30, 40, 50)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("batch_size", 0, "greater than 0, got 0"),
        ("batch_size", "many", "valid integer"),
        ("batch_size", 1.5, "valid integer"),
        ("learning_rate", -1, "greater than 0, got -1"),
        ("learning_rate", float("nan"), "greater than 0"),
        ("weight_decay", -0.1, "greater than or equal to 0"),
        ("stages", 0, "greater than 0"),
        ("rrf_k", 0, "greater than 0"),
        ("seed", -1, "greater than or equal to 0, got -1"),
        ("eval_seeds", [], "at least 1 item"),
        ("eval_seeds", [1, "two"], "--eval-seeds, value 2: Input should be a valid integer"),
        ("temperature", 1.0, "valid tuple"),
        ("temperature", ["hot"], "--temperature, value 1"),
        ("teacher", 3, "valid string"),
        ("train", 3, "not a valid path"),
        ("divergence", "kl", "'forward_kl'"),
        ("long_prompts", "cut", "'error' or 'skip'"),
        ("trust_remote_code", "perhaps", "valid boolean"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_named(name, value, says):
    with pytest.raises(InputError) as error:
        from_options({name: value})
    assert str(error.value).startswith("--" + name.replace("_", "-"))
    assert says in str(error.value)


def test_every_unknown_option_is_named_at_once_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown options batchsize, lr; known are teacher, student, "):
        from_options({"lr": 1, "batchsize": 2, "stages": 3})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: [1", "is not YAML"),
        ("- stages", "expected options as `name: value` lines, got a list"),
        ("stage: 4", "unknown option stage;"),
        ("stages: four", "--stages: Input should be a valid integer"),
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
    mine.write_text("stages: 3\nrrf_k: 20\nbatch-size: 5\n")
    assert run("rank", output, "--config", str(mine), "--stages", "2") == 0
    config = recorded_config(output)
    assert config.schedule.stages == 2  # command line
    assert config.schedule.rrf_k == 20  # YAML
    assert config.training.batch_size == 5  # YAML, kept for the step that it is of
    assert config.generation.max_new_tokens == 4  # recorded by measure
    assert config.training.weight_decay == 0.01  # default
    stages = read_json(output / "curriculum.json")["stages"]
    assert [stage["size"] for stage in stages] == [12, 24]
