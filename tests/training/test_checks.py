"""Options that are refused before a model is loaded or anything is computed."""

import pytest
from tiny_run import options, refusal
from tiny_training import curriculum_of, trainer_of

from pocl_fast.system.errors import InputError
from pocl_fast.training import trainer
from pocl_fast.training.arguments import PoclConfig, check_report_to

AVAILABLE = "pocl_fast.training.arguments.get_available_reporting_integrations"


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
    monkeypatch.setattr(trainer, "prepare", lambda *_: pytest.fail("models are loaded"))
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
