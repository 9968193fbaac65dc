"""What the sets of --dev and --test are called, in words and in YAML, and which names are refused."""

import pytest
from tiny import arithmetic, write_jsonl
from tiny_run import refusal

from pocl_fast.cli import COMMANDS, _parse
from pocl_fast.settings.configuration import from_options, read_yaml, to_yaml
from pocl_fast.settings.evaluation_sets import evaluations_choose, sets_of
from pocl_fast.system.errors import InputError


@pytest.mark.parametrize(
    ("words", "called"),
    [
        (["a.jsonl"], {"dev": "a.jsonl"}),
        (["news=a.jsonl"], {"news": "a.jsonl"}),
        (["a.jsonl", "data/b.v2.jsonl.gz"], {"a": "a.jsonl", "b.v2": "data/b.v2.jsonl.gz"}),
        (["x=a=b.jsonl", "hf:org/name:test[:9]"], {"x": "a=b.jsonl", "name-test-9": "hf:org/name:test[:9]"}),
        (["folder/", "saved:validation"], {"folder": "folder/", "saved-validation": "saved:validation"}),
        (["日本=j.jsonl", "e+1.2_3-x=e.jsonl"], {"日本": "j.jsonl", "e+1.2_3-x": "e.jsonl"}),
        ("a.jsonl", {"dev": "a.jsonl"}),
        ({"one": "a.jsonl", "two": "b.jsonl"}, {"one": "a.jsonl", "two": "b.jsonl"}),
        (None, {}),
    ],
)
def test_a_set_is_called_as_it_is_named_or_as_the_option_or_as_its_file(words, called):
    assert from_options({"dev": words}).data.dev == called


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dev": ["a/b=c.jsonl"]}, "--dev: 'a/b=c.jsonl': a set's name has letters, .* 'a/b' is none"),
        ({"dev": ["=c.jsonl"]}, "'' is none. Give NAME=FILE"),
        ({"test": {"a=b": "c.jsonl"}}, "--test: 'a=b: c.jsonl': .* 'a=b' is none"),
        ({"test": {"..": "c.jsonl"}}, "'..' is none"),
        (
            {"dev": ["x=a.jsonl", "X=b.jsonl"]},
            "two sets are called X .a.jsonl and b.jsonl.: give one of them another",
        ),
        ({"dev": ["one/a.jsonl", "two/a.jsonl"]}, "two sets are called a"),
        ({"dev": ["x=a.jsonl"], "test": ["x=b.jsonl"]}, "--dev and --test: two sets are called x"),
        ({"held_out": 9, "train": "t.jsonl", "test": ["held-out=b.jsonl"]}, "called held-out .held out of t.jsonl and"),
        ({"dev": ["a.jsonl", "*.jsonl"]}, r"'\*.jsonl' tells no name for its set: give NAME=\*.jsonl"),
        ({"dev": 5}, "--dev: must be a file, a list of .NAME=.FILE, or a dict of names and files, got 5"),
    ],
)
def test_what_is_no_name_or_the_name_of_two_sets_is_one_message(given, says):
    with pytest.raises(InputError, match=says):
        from_options(given)


def test_a_file_whose_own_name_has_an_equals_sign_is_found(tmp_path):
    path = write_jsonl(tmp_path / "lr=1.jsonl", arithmetic(1))
    assert from_options({"test": str(path)}).data.test == {"test": str(path)}
    assert from_options({"test": f"x={path}"}).data.test == {"x": str(path)}


def test_the_command_line_takes_the_option_several_times_and_in_place_of_what_was_recorded(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(from_options({"dev": "old.jsonl", "test": "kept.jsonl"})))
    given = ["--output", str(tmp_path), "--dev", "a=a.jsonl", "b=b.jsonl", "--train", "t.jsonl", "--dev=c=c.jsonl"]
    _, config = _parse("train", COMMANDS["train"], given)
    assert config.data.dev == {"a": "a.jsonl", "b": "b.jsonl", "c": "c.jsonl"}
    assert config.data.test == {"test": "kept.jsonl"}
    assert config.data.train == "t.jsonl"
    assert "--dev needs [NAME=]FILE words" in refusal(capsys, "train", tmp_path, "--dev")


def test_sets_are_kept_in_yaml_in_their_order(tmp_path):
    config = from_options({"dev": ["y=b.jsonl", "x=a.jsonl", "z=d.jsonl"], "test": "c.jsonl"})
    (tmp_path / "made.yaml").write_text(to_yaml(config))
    assert read_yaml(tmp_path / "made.yaml") == config
    assert list(read_yaml(tmp_path / "made.yaml").data.dev) == ["y", "x", "z"]  # the first chooses


def test_the_sets_of_dev_come_first_and_what_is_held_out_takes_their_place():
    config = from_options({"test": "b.jsonl", "dev": ["x=a.jsonl", "y=c.jsonl"], "held_out": 3})
    assert [(one.name, one.role, one.source) for one in sets_of(config)] == [
        ("x", "dev", "a.jsonl"),
        ("y", "dev", "c.jsonl"),
        ("test", "test", "b.jsonl"),
    ]
    held_out = from_options({"test": "b.jsonl", "held_out": 3})
    assert [(one.name, one.source) for one in sets_of(held_out)] == [("held-out", None), ("test", "b.jsonl")]


@pytest.mark.parametrize(
    ("given", "choose"),
    [
        ({}, True),
        ({"stage_weights": "last"}, False),
        ({"stage_weights": "last", "patience": 1}, True),  # which ends stages
        ({"set": {"eval_strategy": "no"}}, False),
    ],
)
def test_evaluations_choose_where_a_stages_weights_or_its_end_follow_them(given, choose):
    assert evaluations_choose(from_options(given)) == choose
