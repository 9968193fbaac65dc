"""What a trainer uploads."""

from concurrent.futures import Future
from pathlib import Path

from tiny_training import curriculum_of, trainer_of


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
