"""`PoclConfig`: what it refuses, how it is parsed, the paper's preset."""

import numpy as np
import pytest
from tiny_run import options, refusal
from tiny_training import curriculum_of, trainer_of
from transformers import HfArgumentParser

from pocl_fast.system.errors import InputError
from pocl_fast.training import trainer
from pocl_fast.training.arguments import PoclConfig, check_report_to

AVAILABLE = "pocl_fast.training.arguments.get_available_reporting_integrations"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .*; got 'kl'"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"num_train_epochs": 3}, "give epochs_per_stage"),
        ({"load_best_model_at_end": True}, 'stage_weights="best"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not for this trainer"),
        ({"per_device_eval_batch_size": 2}, "give generation_batch_size"),
        ({"dataloader_drop_last": True}, "the schedule makes the batches"),
        ({"auto_find_batch_size": True}, "halved by itself"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen"),
        ({"eval_delay": 2}, "eval_delay"),
        ({"torch_compile": True}, "compiled again"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' has no state"),
        ({"save_strategy": "best"}, "the best weights are kept anyway"),
        ({"remeasure": True, "dataloader_num_workers": 2}, "dataloader_num_workers=0"),
        ({"patience": 2, "eval_strategy": "no"}, "patience needs evaluations"),
        ({"skew": 1.5}, "skew must be above 0 and below 1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of stop, skip"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        PoclConfig(output_dir=str(tmp_path), **given)


def test_numpys_numbers_are_numbers(tmp_path):
    args = PoclConfig(str(tmp_path), stages=np.int64(3), learning_rate=np.float32(0.5), max_grad_norm=0)
    assert (args.stages, args.learning_rate, args.max_grad_norm) == (3, 0.5, 0.0)
    assert type(args.stages) is int
    with pytest.raises(InputError, match="stages must be an integer"):
        PoclConfig(str(tmp_path), stages=np.float32(2.5))


def test_a_command_line_parses_into_the_arguments(tmp_path):
    parser = HfArgumentParser(PoclConfig)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--divergence", "jsd", "--temperature", "1", "3"]
    [args] = parser.parse_args_into_dataclasses([*words, "--report_to", "none"])
    assert (args.divergence, args.temperature, args.report_to) == ("jsd", [1.0, 3.0], [])


def test_the_paper_preset_is_the_papers_recipe(tmp_path):
    args = PoclConfig.preset("paper", str(tmp_path), divergence="reverse_kl", use_cpu=True)
    assert (args.stages, args.epochs_per_stage, args.learning_rate, args.weight_decay) == (4, 8, 1e-4, 0.01)
    assert (args.temperature, args.alpha) == ([1.0, 1.33, 1.67, 2.0], [0.3, 0.2, 0.1, 0.0])
    assert (args.ties, PoclConfig(str(tmp_path), use_cpu=True).ties) == ("first", "average")
    assert args.objective().temperature_power == 0  # the code does not scale reverse KL
    assert PoclConfig.preset("paper", str(tmp_path), use_cpu=True).objective().temperature_power == 2
    assert args.stages * args.epochs_per_stage * (1 + args.stages) / (2 * args.stages) == 20  # passes over all samples
    with pytest.raises(ValueError, match="there is paper"):
        PoclConfig.preset("pape", str(tmp_path))


@pytest.mark.parametrize("given", ["none", "all", None, [], "tensorboard", ["tensorboard", "wandb"]])
def test_places_to_report_to_that_are_installed_are_taken(monkeypatch, given):
    monkeypatch.setattr(AVAILABLE, lambda: ["tensorboard", "wandb"])
    check_report_to(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wandbb", "report_to must be among none, all, .*tensorboard, .*wandb; got 'wandbb'"),
        (["tensorboard", "tensorbord"], "report_to must be among .*; got 'tensorbord'"),
        ("wandb", r"report_to 'wandb': the package that it needs is not installed; here are \['tensorboard'\]"),
    ],
)
def test_a_place_to_report_to_that_is_misspelt_or_not_installed_is_refused(monkeypatch, given, message):
    monkeypatch.setattr(AVAILABLE, lambda: ["tensorboard"])
    with pytest.raises(InputError, match=message):
        check_report_to(given)


def test_the_trainer_refuses_it_before_it_loads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "training_parts", lambda *_: pytest.fail("models are loaded"))
    with pytest.raises(InputError, match="got 'wandbb'"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), report_to="wandbb")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"report_to": "wandbb"}, "got 'wandbb'"),
        (
            {"signals": "rouge_l,mean_kl", "cache_mode": "topk"},
            "measures mean_kl from the teacher's cache, and cache_mode=topk",
        ),
    ],
    ids=["report_to", "topk"],
)
def test_distill_refuses_them_before_it_measures(finished, tmp_path, capsys, wrong, message):
    said = refusal(capsys, "distill", tmp_path / "out", *options(finished[0], **wrong), "--remeasure")
    assert message in said
    assert not list(tmp_path.rglob("difficulty*"))


@pytest.mark.parametrize(
    "changes",
    [{"remeasure": False}, {"signals": "rouge_l"}, {"cache_mode": "hidden"}],
    ids=["once", "student-alone", "hidden"],
)
def test_measuring_again_from_a_cache_of_the_most_likely_tokens_is_refused(tmp_path, changes):
    given = {"remeasure": True, "signals": "rouge_l,mean_kl", "cache_mode": "topk", "use_cpu": True}
    with pytest.raises(InputError, match="measures mean_kl from the teacher's cache"):
        PoclConfig(output_dir=str(tmp_path), **given)
    PoclConfig(output_dir=str(tmp_path), **(given | changes))
