"""What `import pocl_fast` gives, and what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pocl_fast


@pytest.mark.parametrize("name", pocl_fast.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(pocl_fast, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(pocl_fast)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distillation_los'"):
        _ = pocl_fast.distillation_los


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded once it ran the code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    )


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import pocl_fast") & {"torch", "numpy", "transformers", "triton", "bitsandbytes"}


def test_the_loss_needs_neither_transformers_nor_triton_nor_bitsandbytes():
    used = modules_after(
        "import torch, pocl_fast\n"
        "logits = torch.zeros(2, 4)\n"
        "pocl_fast.distillation_loss(logits, logits, torch.zeros(2, dtype=torch.int64), pocl_fast.Objective())"
    )
    assert not used & {"transformers", "bitsandbytes", "matplotlib", "pyarrow"}


def test_the_curriculum_needs_no_torch():
    used = modules_after("import pocl_fast; pocl_fast.reciprocal_rank_fusion([[0.1, 0.2]], descending=[True])")
    assert not used & {"torch", "transformers"}


def test_the_trainer_needs_torch_and_transformers_alone_where_the_curriculum_is_given(tmp_path):
    """Nor what the command line and other formats of models need: a machine for training may lack them."""
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "HIDDEN = {'pydantic', 'pyarrow', 'tyro', 'rouge_score', 'gguf', 'bitsandbytes', 'matplotlib',\n"
        "          'datasets', 'deepspeed'}  # which need pyarrow and pydantic\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] in HIDDEN else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from tiny_training import curriculum_of, trainer_of\n"
        "import pocl_fast\n"
        "[getattr(pocl_fast, name) for name in pocl_fast.__all__]\n"
        f"trainer_of(Path({str(tmp_path)!r}), curriculum=curriculum_of(8, stages=1)).train()\n"
        "assert not HIDDEN & {name.split('.')[0] for name in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().count("eval_rouge_l") == 1
