"""What --set takes: any argument of transformers that no option decides, by its declared type."""

import pytest
from tiny_run import make_inputs, options, refusal, select

from pocl_fast.options.run import RunConfig
from pocl_fast.settings.configuration import from_options, read_yaml, to_yaml
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig


def test_values_have_the_types_that_transformers_declares():
    words = [
        "optim=adamw_8bit", "warmup_steps=0.03", "max_steps=1e2", "logging_first_step=false", "data_seed=null",
        'fsdp_config={"version": 2}', "adam-beta2=0.95", "run_name=null", "eval_strategy=steps", "eval_steps=50",
    ]  # fmt: skip
    assert from_options({"set": words}).trainer.set == {
        "optim": "adamw_8bit", "warmup_steps": 0.03, "max_steps": 100, "logging_first_step": False, "data_seed": None,
        "fsdp_config": {"version": 2}, "adam_beta2": 0.95, "run_name": None, "eval_strategy": "steps",
        "eval_steps": 50.0,
    }  # fmt: skip


def test_a_warm_up_given_as_a_ratio_is_the_share_of_a_stages_steps(tmp_path):
    """transformers 5 has no warmup_ratio; its warmup_steps are a ratio below 1."""
    config = from_options({"set": ["warmup_ratio=0.25"]})
    assert config.trainer.set == {"warmup_steps": 0.25}
    assert PoclConfig.of_run(config, tmp_path).get_warmup_steps(40) == 10


def test_a_yaml_files_arguments_are_kept_and_the_command_lines_are_added_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("set: {optim: sgd, max_steps: 7, lr_scheduler_kwargs: {num_cycles: 2}}\n")
    config = from_options({"set": ["max_steps=9"]}, read_yaml(path))
    assert config.trainer.set == {"optim": "sgd", "max_steps": 9, "lr_scheduler_kwargs": {"num_cycles": 2}}
    path.write_text(to_yaml(config))
    assert read_yaml(path) == config
    path.write_text("set: {optim: sgd}\n")  # a file's take the place of those that were recorded
    assert read_yaml(path, config).trainer.set == {"optim": "sgd"}
    path.write_text("set: {}\n")
    assert read_yaml(path, config).trainer.set == {}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optm=sgd", r"TrainingArguments have no 'optm' \(did you mean optim\?\)"),
        ("optim=adamw_8bt", r"optim must be one of .*; got 'adamw_8bt' \(did you mean adamw_8bit"),
        ("adam_beta1=many", "adam_beta1 must be a number, got 'many'"),
        ("fsdp_config={1}", "fsdp_config is not JSON"),
        ("optim", "must be NAME=VALUE, got 'optim'"),
        ("learning_rate=3", "learning_rate is decided by --learning-rate"),
        ("per_device_train_batch_size=3", "per_device_train_batch_size is decided by --batch-size"),
        ("gradient_checkpointing=true", "gradient_checkpointing is decided by --activation-checkpointing"),
        ("activation_checkpointing=true", "activation_checkpointing is decided by --activation-checkpointing"),
        ("bf16=true", "bf16 is decided by --precision"),
        ("use_cpu=true", "use_cpu is decided by --device"),
        ("output_dir=x", "output_dir is decided by --output"),
        ("hub_token=secret", "hub_token is decided by the environment"),
        ("warmup_ratio=3", "warmup_ratio must be .*below 1.*got 3"),
        ("num_train_epochs=3", "give epochs_per_stage"),
        ("torch_compile=true", "torch_compile is not for this trainer"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(word, says):
    with pytest.raises(InputError, match=f"^--set: .*{says}"):
        from_options({"set": [word]})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "warmup_steps=-1"], "--set warmup_steps: "),
        (["--set", "warmup_steps=nan"], "lr_scheduler_type cosine: cannot convert float NaN"),
        (["--set", 'lr_scheduler_kwargs={"junk": 1}'], "lr_scheduler_type cosine: "),
        (["--set", "adam_beta1=2"], "optim adamw_torch_fused: "),
        (["--set", "optim=lomo"], "optim lomo: "),
        (["--set", "metric_for_best_model=eval_nosuch"], "metric_for_best_model must be one of rouge_l, cross_entropy"),
        (["--set", "lr_scheduler_type=reduce_lr_on_plateau"], "depends on more than the step"),
        (["--set", "log_level=foo"], "log_level 'foo' is none that"),
        (["--set"], "--set needs NAME=VALUE words"),
        (["--rrf-k", "inf"], "--rrf-k must be above 0, got inf"),
        (["--report-to", "none", "tensorboard"], "'none' stands alone"),
        (["--alpha", "2", "3"], "alpha, the weight of cross-entropy, must be within 0 to 1, got 2.0"),
        (["--set", "eval_strategy=no", "--patience", "2"], "patience needs evaluations"),
        (["--set", "save_strategy=best"], 'save_strategy="best" would not save what a stop leaves'),
        (["--report-to", "wandbb"], "got 'wandbb' (did you mean wandb"),
        (["--set", "optm=1", "--set=max_steps=x"], "'optm' (did you mean optim?); max_steps must be an integer"),
    ],
)
def test_what_transformers_would_refuse_later_is_said_before_anything_is_computed(tmp_path, capsys, words, says):
    inputs, output = make_inputs(tmp_path, train=8, dev=2), tmp_path / "out"
    said = refusal(capsys, "distill", output, *options(inputs), *words)
    assert says in said
    assert said.count("\n") == 1
    assert not (output / "difficulty.parquet").exists()


def test_train_too_refuses_before_it_begins(tmp_path, capsys):
    inputs, output = make_inputs(tmp_path, train=8, dev=2), tmp_path / "out"
    output.mkdir()
    (output / "config.yaml").write_text(to_yaml(RunConfig()))
    said = refusal(capsys, "train", output, *select(options(inputs), "train"), "--set", "warmup_steps=-1")
    assert "--set warmup_steps: " in said
    assert not (output / "steps.json").exists()


@pytest.mark.parametrize("old", [False, True])
def test_activation_checkpointing_has_one_meaning_under_both_names(tmp_path, old):
    name = "gradient_checkpointing" if old else "activation_checkpointing"
    args = PoclConfig(str(tmp_path), use_cpu=True, **{name: True})
    assert args.activation_checkpointing
    assert args.gradient_checkpointing
    assert not PoclConfig(str(tmp_path), use_cpu=True).gradient_checkpointing
