"""What a step is made from: every option of the groups that it reads, but those that do not change its result."""

import pytest
from tiny_options import CHANGED
from tiny_run import make_inputs

from pocl_fast.options.run import RunConfig
from pocl_fast.run_directory.directory import RunDirectory
from pocl_fast.run_directory.step_inputs import READS
from pocl_fast.settings.configuration import from_options

# options that change no result, by the steps that read their group
WITHOUT_EFFECT = {
    "device", "teacher_device", "activation_checkpointing", "logging_steps", "report_to", "save_minutes",
}  # fmt: skip


def test_every_option_but_a_few_changes_what_a_step_is_made_from():
    without = set()
    for name, value in CHANGED.items():
        of_adapters = name in ("lora_alpha", "lora_targets", "merge_adapters")  # which say how, where there are some
        of_competence = name in ("initial_competence", "full_competence")
        plain = from_options({"lora_rank": 1} if of_adapters else {"pacing": "competence"} if of_competence else {})
        changed = from_options({name: value}, plain)
        if all(reads.options(changed) == reads.options(plain) for reads in READS.values()):
            without.add(name)
    assert without == WITHOUT_EFFECT


def test_an_option_that_is_named_as_without_effect_is_one_of_the_steps_groups():
    for step, reads in READS.items():
        names = {name for group in reads.groups for name in RunConfig().flat() if _in(group, name)}
        assert set(reads.but) <= names, step


def _in(group, name):
    return name in vars(getattr(RunConfig(), group)) or name == "batch_size"


@pytest.mark.parametrize(
    ("set_", "changes"),
    [
        ({"optim": "sgd"}, {"--set optim": "sgd"}),
        ({"ddp_timeout": 7200, "torch_empty_cache_steps": 3}, {}),
        ({"eval_strategy": "steps"}, {"--set eval_strategy": "steps", "--set eval_steps": 5.0}),  # logging_steps
        ({"logging_first_step": False, "save_total_limit": 1, "dataloader_num_workers": 2}, {}),
    ],
)
def test_an_argument_of_transformers_counts_where_it_changes_what_is_learnt(set_, changes):
    plain, changed = (READS["train"].options(from_options({"set": given})) for given in ({}, set_))
    assert changed == plain | changes


@pytest.mark.parametrize("remeasure", [False, True])
def test_options_of_measuring_count_in_a_training_that_measures_again(remeasure):
    plain, changed = (
        READS["train"].options(from_options({"remeasure": remeasure, **given}))
        for given in ({}, {"generation_engine": "torch", "signals": "rouge_l", "measure_seed": 1})
    )
    assert (changed != plain) == remeasure


def test_an_argument_that_was_set_before_is_named_when_it_changes(tmp_path):
    from pocl_fast.run_directory.directory import _changes

    assert _changes({"--set optim": "sgd", "seed": 1}, {"seed": 1}) == "--set optim: was sgd, now None"
    directory = RunDirectory(tmp_path / "out")
    inputs = make_inputs(tmp_path, train=2, dev=2)
    given = {"teacher": str(inputs / "teacher"), "student_layers": 2, "train": inputs / "train.jsonl"}
    made = directory.made_from("measure", from_options(given))
    assert made["student"].startswith("cut from ")
    assert "teacher" not in made
    assert "train" not in made
    assert len(made["train data"]) == 64
