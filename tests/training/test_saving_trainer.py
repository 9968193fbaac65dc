"""What a trainer uploads, and which of its checkpoints it goes on from."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from tiny_training import curriculum_of, trainer_of

from pocl_fast.system.errors import InputError


def test_only_the_model_is_uploaded(tmp_path, monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, *_, **__):
            return type("Url", (), {"repo_id": "someone/student"})

        def upload_folder(self, folder_path, **_):
            uploaded.append(sorted(path.name for path in Path(folder_path).rglob("*")))
            done = Future()
            done.set_result(type("Commit", (), {"is_done": lambda _: True}))
            done.is_done = done.done
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = trainer_of(
        tmp_path,
        curriculum=curriculum_of(8, stages=1),
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(uploaded) >= 2
    for names in uploaded:
        assert "model.safetensors" in names
        assert not {"teacher_cache", "metrics.jsonl", "difficulty.parquet"} & set(names)
        assert not any("best" in name or "checkpoint" in name for name in names)


def only_models(folder, stop=-1, **options):
    """A trainer of 6 steps whose checkpoints hold the model alone; it stops after `stop` of them."""
    return trainer_of(
        folder, count=8, curriculum=curriculum_of(8, stages=1), epochs_per_stage=3, dev=False, max_steps=stop,
        save_only_model=True, **options,
    )  # fmt: skip


def test_a_training_does_not_go_on_from_a_model_alone(tmp_path, capsys):
    only_models(tmp_path, stop=2).train()
    assert "save_only_model: a training that is stopped cannot go on from its checkpoints" in capsys.readouterr().out
    later = only_models(tmp_path)
    with pytest.raises(InputError, match=r"cannot go on from .*checkpoint-2: it holds the model alone.*delete"):
        later.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"it holds the model alone"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.state.global_step == 0


def test_a_training_that_is_done_ends_from_a_model_alone(tmp_path):
    only_models(tmp_path).train()
    again = only_models(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_checkpoint_with_its_optimizer_says_nothing_about_that(tmp_path, capsys):
    trainer_of(tmp_path, count=4, curriculum=curriculum_of(4, stages=1), dev=False).train()
    assert "save_only_model" not in capsys.readouterr().out
