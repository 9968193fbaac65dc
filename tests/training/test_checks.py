"""Options that are refused before a model is loaded or anything is computed."""

from types import SimpleNamespace

import pytest
from tiny_training import curriculum_of, trainer_of

from pocl_fast.system.errors import InputError
from pocl_fast.training import trainer
from pocl_fast.training.checks import check_options, check_report_to

AVAILABLE = "transformers.integrations.get_available_reporting_integrations"


@pytest.mark.parametrize("given", ["none", "all", None, [], "tensorboard", ["tensorboard", "wandb"]])
def test_places_to_report_to_that_are_installed_are_taken(monkeypatch, given):
    monkeypatch.setattr(AVAILABLE, lambda: ["tensorboard", "wandb"])
    check_report_to(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wandbb", "report_to 'wandbb' is not known: give none, all, or one of .*tensorboard, .*wandb"),
        (["tensorboard", "tensorbord"], "report_to 'tensorbord' is not known"),
        ("wandb", r"'wandb' needs a package that is not installed \(installed: tensorboard\)"),
        ("azure_ml", "'azure_ml' needs a package that is not installed"),
    ],
)
def test_a_place_to_report_to_that_is_misspelt_or_not_installed_is_refused(monkeypatch, given, message):
    monkeypatch.setattr(AVAILABLE, lambda: ["tensorboard"])
    with pytest.raises(InputError, match=message):
        check_report_to(given)


def test_the_trainer_refuses_it_before_it_loads_a_model(tmp_path, monkeypatch):
    def prepare(*_):
        pytest.fail("models are loaded")

    monkeypatch.setattr(trainer, "prepare", prepare)
    with pytest.raises(InputError, match="report_to 'wandbb' is not known"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), report_to="wandbb")


@pytest.mark.parametrize(
    "changes",
    [{"remeasure": False}, {"signals": "rouge_l"}, {"cache_mode": "hidden"}],
    ids=["once", "student-alone", "hidden"],
)
def test_measuring_again_from_a_cache_of_the_most_likely_tokens_is_refused(changes):
    options = {"report_to": "none", "remeasure": True, "signals": "rouge_l,mean_kl", "cache_mode": "topk"}
    with pytest.raises(InputError, match="measures mean_kl from the teacher's cache"):
        check_options(SimpleNamespace(**options))
    check_options(SimpleNamespace(**(options | changes)))
