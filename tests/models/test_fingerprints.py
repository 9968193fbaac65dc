"""Models told from one another by files, commit and weights."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny_model

from pocl_fast.models.fingerprints import hub_revision, source_fingerprint, weights_fingerprint
from pocl_fast.system.errors import InputError


def test_weights_have_another_fingerprint_after_the_smallest_change():
    model = tiny_model()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(tiny_model())
    assert len(before) == 64
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(tiny_model().bfloat16()) != before


@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_a_source_has_another_fingerprint_when_a_tensor_anywhere_in_its_weights_changes(tmp_path, part):
    folder = save_tiny(tmp_path / "model")
    weights = {f"{i:02d}": torch.zeros(1 << 16) for i in range(20)}  # 5 MiB: more than is read whole
    save_file(weights, folder / "model.safetensors")
    before = source_fingerprint(str(folder))
    assert before.startswith(f"{folder} (")
    assert source_fingerprint(str(folder)) == before
    weights[{"first": "00", "middle": "10", "last": "19"}[part]] += 1
    save_file(weights, folder / "model.safetensors")
    assert source_fingerprint(str(folder)) != before


def test_a_source_has_another_fingerprint_when_its_settings_or_template_change_but_not_its_notes(tmp_path):
    folder = save_tiny(tmp_path / "model")
    prints = [source_fingerprint(str(folder))]
    (folder / "README.md").write_text("notes")
    assert source_fingerprint(str(folder)) == prints[0]
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text() + " ")
        prints.append(source_fingerprint(str(folder)))
    assert len(set(prints)) == 4
    assert source_fingerprint("org/model") == "org/model"


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/tool_use.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "modeling_own.py",
        "pytorch_model.bin",
    ],
)  # fmt: skip
def test_a_source_has_another_fingerprint_when_any_file_that_is_loaded_changes(tmp_path, name):
    folder = save_tiny(tmp_path / "model")
    prints = [source_fingerprint(str(folder))]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    for text in ("a", "b"):
        path.write_text(text)
        prints.append(source_fingerprint(str(folder)))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("commit", ["a" * 40, "b" * 40])
def test_a_hub_model_is_told_from_its_next_version_by_its_commit(tmp_path, monkeypatch, commit):
    place = tmp_path / "models--org--tiny"
    save_tiny(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_revision("org/tiny") == commit
    assert hub_revision(str(place / "snapshots" / commit)) is None
    with pytest.raises(InputError, match="cannot load the model 'org/other'"):
        hub_revision("org/other")
