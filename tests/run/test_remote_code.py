"""Models whose class comes with their folder: through a whole run, into what it saves, and only where that is
allowed."""

import json
import shutil

import pytest
import torch
from tiny import arithmetic
from tiny_run import make_inputs, options, refusal, run

from pocl_fast.models.loading import load_model
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A run's inputs, whose teacher's class is in its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = make_inputs(tmp_path / "inputs", train=4, dev=2, hidden=64)
    (made / "teacher" / "own.py").write_text(CODE)
    path = made / "teacher" / "config.json"
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    own |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return made


def loads_elsewhere(folder, tmp_path):
    """The model of a folder that was moved, while the one it was made from is gone."""
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "inputs" / "teacher")
    with pytest.raises(InputError, match=r"cannot load the model .*elsewhere.* brings code of its own"):
        load_model(str(tmp_path / "elsewhere"))
    model = load_model(str(tmp_path / "elsewhere"), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_run_trains_such_a_student_to_the_end_and_saves_its_code(inputs, tmp_path):
    words = [*options(inputs, stages=2, eval_seeds=(10,), teacher_quantization="8bit"), "--trust-remote-code"]
    assert run("distill", tmp_path / "out", *words) == 0
    assert run("distill", tmp_path / "out", *words) == 0  # all of it is done
    loads_elsewhere(tmp_path / "out" / "student", tmp_path)


def test_a_trainer_saves_the_code_of_a_student_given_by_name(inputs, tmp_path):
    args = PoclConfig(
        str(tmp_path / "out"), use_cpu=True, precision="fp32", curriculum="none", stages=1, epochs_per_stage=1,
        trust_remote_code=True, student_layers=2, max_new_tokens=2, max_length=96, max_prompt_length=80,
    )  # fmt: skip
    name = inputs / "teacher"
    trainer = PoclTrainer(name, name, args, arithmetic(4))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loads_elsewhere(tmp_path / "saved", tmp_path)


def test_such_a_model_is_refused_where_its_code_is_not_allowed(inputs, tmp_path, capsys):
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs))
    assert "cannot load the " in said
    assert "it brings code of its own, which is run with --trust-remote-code" in said
    assert said.count("\n") == 1
