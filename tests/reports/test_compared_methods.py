"""Runs that differ in the training seed alone are one method; a method is called by what sets it apart."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_compared import make_run

from pocl_fast.reports.compared_methods import grouped, named
from pocl_fast.reports.compared_runs import read_run
from pocl_fast.system.errors import InputError


@pytest.fixture
def made(tmp_path):
    def make(name, **options):
        return read_run(make_run(tmp_path / name, **options))

    return make


def members(methods):
    return {method.name: [run.path.name for run in method.runs] for method in methods}


def refused(call):
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def test_runs_that_differ_in_the_seed_alone_are_one_method_named_by_what_differs(made):
    runs = [
        made("a1", seed=1),
        made("b1", curriculum="none"),
        made("a2", seed=2),
        made("b2", curriculum="none", seed=2),
    ]
    methods = grouped(runs)
    assert members(methods) == {"curriculum pocl": ["a1", "a2"], "curriculum none": ["b1", "b2"]}
    assert [(method.label, method.seeds) for method in methods] == [("A", (1, 2)), ("B", (1, 2))]


def test_the_divergence_says_itself_and_stands_first(made):
    runs = [made("a"), made("b", curriculum="none"), made("c", divergence="reverse_kl", alpha=[0.5])]
    assert list(members(grouped(runs))) == [
        "forward_kl, curriculum pocl, alpha 0.3 0.3",
        "forward_kl, curriculum none, alpha 0.3 0.3",
        "reverse_kl, curriculum pocl, alpha 0.5",
    ]


def test_options_that_do_not_change_what_is_learnt_make_no_other_method(made):
    runs = [made("a", seed=1), made("b", seed=2, logging_steps=1.0, device="cpu", save_minutes=3.0)]
    assert len(grouped(runs)) == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"fresh_optimizer": True}, ["fresh optimizer off", "fresh optimizer on"]),
        ({"tokens_per_batch": 512}, ["tokens per batch not given", "tokens per batch 512"]),
        ({"learning_rate": 3e-5}, ["learning rate 0.0001", "learning rate 3e-05"]),
        ({"set": {"optim": "sgd"}}, ["optim not given", "optim sgd"]),
    ],
)
def test_values_are_words(made, options, names):
    assert list(members(grouped([made("a"), made("b", **options)]))) == names


def test_data_are_compared_by_content_and_called_by_their_file(made):
    runs = [made("a"), made("b", seed=2, train="moved/elsewhere.jsonl"), made("c", train="x/more.jsonl", data="2" * 64)]
    assert members(grouped(runs)) == {"train data train.jsonl": ["a", "b"], "train data more.jsonl": ["c"]}


def test_two_files_of_one_name_are_told_apart_by_their_fingerprints(made):
    runs = [made("a", data="ab" * 32), made("b", data="cd" * 32)]
    assert list(members(grouped(runs))) == ["train data train.jsonl (abababab)", "train data train.jsonl (cdcdcdcd)"]


def test_a_method_whose_options_make_no_name_is_called_by_its_folder(made):
    many = {"system_prompt": "Answer in one short line, and say nothing that is not asked for.", "stages": 3}
    assert list(members(grouped([made("short"), made("long", alpha=[0.2], **many)]))) == ["short", "long"]
    assert list(members(grouped([made("one", seed=1), made("two", seed=2)]))) == ["one"]


def test_names_are_one_a_method_or_one_a_run(made):
    runs = [made("a1", seed=1), made("a2", seed=2), made("b", curriculum="none")]
    assert members(grouped(runs, ["ours", "flat"])) == {"ours": ["a1", "a2"], "flat": ["b"]}
    assert members(grouped(runs, ["x", "y", "x"])) == {"x": ["a1", "b"], "y": ["a2"]}


def test_another_number_of_names_is_refused_with_what_the_methods_are(made):
    runs = [made("a1", seed=1), made("a2", seed=2), made("b", curriculum="none")]
    said = refused(lambda: grouped(runs, ["ours"]))
    assert "--names: 1 name for 2 methods of 3 runs" in said
    assert said.endswith("differ in the seed alone: a1, a2; b")
    assert "--names: a name is empty" in refused(lambda: grouped(runs, ["x", " "]))
    assert "'x' names two methods" in refused(lambda: grouped(runs, ["x", "x"]))


def test_runs_that_a_name_puts_together_are_said_to_differ(made):
    [method] = named({"all": [made("a"), made("b", seed=2, learning_rate=1e-3)]})
    assert method.differing == {"learning_rate": ("0.0001", "0.001")}


def test_a_method_without_runs_is_refused():
    assert "the method 'empty' has no runs" in refused(lambda: named({"empty": []}))


def test_a_run_that_is_given_twice_is_refused(made, tmp_path, monkeypatch):
    first = made("a")
    assert f"{first.path} is given twice; give each run once" in refused(lambda: grouped([first, read_run(first.path)]))
    (tmp_path / "link").symlink_to(first.path)
    said = refused(lambda: grouped([first, read_run(tmp_path / "link")]))
    assert f"{tmp_path / 'link'} is given twice (as {first.path} too)" in said
    monkeypatch.chdir(tmp_path)
    assert "is given twice" in refused(lambda: grouped([first, read_run(Path("a"))]))


def test_a_copy_of_a_run_is_no_second_seed(made, tmp_path):
    first = made("a", seed=7)
    copy = read_run(shutil.copytree(first.path, tmp_path / "copy"))
    for call in (
        lambda: grouped([first, copy]),
        lambda: grouped([first, copy], ["x", "y"]),
        lambda: named({"x": [first, copy]}),
    ):
        said = refused(call)
        assert f"{first.path} and {copy.path} are the same run twice: the same options and the training seed 7" in said


def test_labels_go_on_behind_z(made, tmp_path):
    runs = [made(f"run{n}", stages=n + 1) for n in range(28)]
    labels = [method.label for method in grouped(runs)]
    assert (labels[:2], labels[25:]) == (["A", "B"], ["Z", "AA", "AB"])


def change_stamps(path, change):
    stamps = json.loads((path / "steps.json").read_text())
    change(stamps)
    (path / "steps.json").write_text(json.dumps(stamps))
    return read_run(path)


def test_what_a_run_has_made_itself_makes_no_other_method(made):
    """The student that a warm-up made, for example, which is another one for each seed."""
    runs = [
        change_stamps(
            made(f"a{n}", seed=n).path, lambda stamps, n=n: stamps["train"]["made_from"].update({"warm": f"{n}" * 64})
        )
        for n in (1, 2)
    ]
    assert len(grouped(runs)) == 1


def test_an_option_that_a_run_does_not_read_is_no_part_of_its_name(made):
    def fine_tuned(stamps):
        stamps["sft"] = stamps.pop("train")
        for name in ("divergence", "alpha", "temperature", "curriculum", "stages", "beta", "skew", "teacher"):
            stamps["sft"]["made_from"].pop(name, None)
        for step in ("measure", "rank"):
            stamps.pop(step)

    runs = [made("a"), made("b", divergence="jsd"), change_stamps(made("c").path, fine_tuned)]
    assert members(grouped(runs)) == {"distill, forward_kl": ["a"], "distill, jsd": ["b"], "sft": ["c"]}


def test_runs_whose_steps_are_not_recorded_are_compared_by_all_options(made):
    paths = [made(name, seed=n, **options).path for n, (name, options) in enumerate(
        [("a", {}), ("b", {}), ("c", {"divergence": "jsd"})])]  # fmt: skip
    for path in paths:
        (path / "steps.json").unlink()
    assert members(grouped([read_run(path) for path in paths])) == {"forward_kl": ["a", "b"], "jsd": ["c"]}
