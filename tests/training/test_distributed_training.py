"""Two ranks train to what one process trains to: under DDP, under FSDP2, stopped and resumed."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import gloo
from safetensors.torch import load_file
from tiny_run import options
from tiny_training import curriculum_of, train, trainer_of, weights_of

from pocl_fast.system.errors import InputError, Interrupted
from pocl_fast.training.checkpoints import step_of
from pocl_fast.training.metrics import read_metrics

pytestmark = gloo

# 22 samples in steps of 4: each pass ends in a step that gives the ranks unequal numbers of samples
SETTING = {"epochs_per_stage": 1, "learning_rate": 1e-3, "logging_steps": 1}
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "reshard_after_forward": True,
    },
}


def curriculum():
    return curriculum_of(22, stages=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights after one process, and the logged losses and scores."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    student = train(folder, curriculum=curriculum(), **SETTING)
    return weights_of(student), logged(folder)


def logged(folder):
    names = ("step", "stage", "loss", "ce", "divergence", "grad_norm", "supervised_tokens", "eval_cross_entropy")
    return [{name: r[name] for name in names if name in r} for r in read_metrics(folder / "metrics.jsonl")]


@contextmanager
def joined():
    """transformers sees the group of ranks as torchrun's."""
    from accelerate import state
    from accelerate.utils import DistributedType

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    init = state.AcceleratorState.__init__

    def sharded_on_a_cpu(self, *args, fsdp_plugin=None, **kwargs):  # accelerate does so on GPUs alone
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    def reset():
        for one in (state.AcceleratorState, state.PartialState, state.GradientState):
            one._shared_state.clear()

    reset()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(state.AcceleratorState, "__init__", sharded_on_a_cpu),
    ):
        yield
    reset()


def train_on_rank(folder, options, stop_at=None, stopped_rank=0):
    """The whole weights on this rank after training; None where a signal, got before step `stop_at`, stopped it."""
    with joined():
        trainer = trainer_of(folder, **({"curriculum": curriculum(), "per_device_train_batch_size": 2} | options))
        enter = trainer._enter

        def signalled(place):
            if trainer.state.global_step == stop_at and dist.get_rank() == stopped_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            enter(place)

        trainer._enter = signalled
        try:
            trainer.train(resume_from_checkpoint=True)
        except Interrupted:
            return None
        assert trainer.is_fsdp_enabled == ("fsdp" in options)
        parameters = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trainer.model.named_parameters()}
        return {name: p.detach().clone() for name, p in parameters.items()}


def assert_the_same(ranks_weights, folder, alone):
    weights, records = alone
    for ours in ranks_weights:
        assert ours.keys() == weights.keys()
        for name, value in weights.items():
            # AdamW steps by the sign of gradients that are rounding alone, and one process adds a tied embedding's in
            # another order; a step is 1e-4 at most
            torch.testing.assert_close(ours[name], value, rtol=0, atol=6e-5)
    assert [r["step"] for r in logged(folder)] == [r["step"] for r in records]
    for ours, record in zip(logged(folder), records, strict=True):
        assert ours == pytest.approx(record, rel=2e-5)


@pytest.mark.parametrize("options", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_ranks_give_the_losses_and_weights_of_one_process(two_ranks, tmp_path, alone, options):
    folder = tmp_path / "run"
    weights = two_ranks(train_on_rank, folder, SETTING | options)
    assert_the_same(weights, folder, alone)


def test_two_ranks_train_the_adapters_of_one_process(two_ranks, tmp_path):
    lora = SETTING | {"lora_rank": 2, "lora_targets": ["q_proj", "v_proj"]}
    one, two = tmp_path / "one", tmp_path / "two"
    student = train(one, curriculum=curriculum(), **lora)
    assert_the_same(two_ranks(train_on_rank, two, lora), two, (weights_of(student), logged(one)))


def test_two_ranks_fine_tune_without_a_teacher_as_one_process_does(two_ranks, tmp_path):
    supervised = SETTING | {"supervised": True, "curriculum": curriculum_of(22, stages=1, alphas=[1.0])}
    one, two = tmp_path / "one", tmp_path / "two"
    student = train(one, **supervised)
    assert_the_same(two_ranks(train_on_rank, two, supervised), two, (weights_of(student), logged(one)))


def test_accumulation_over_ranks_weighs_every_token_alike(two_ranks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    student = train(one, curriculum=curriculum(), per_device_train_batch_size=8, **SETTING)
    weights = two_ranks(train_on_rank, two, {**SETTING, "gradient_accumulation_steps": 2})
    assert_the_same(weights, two, (weights_of(student), logged(one)))


@pytest.mark.parametrize("options", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_a_signal_to_one_rank_stops_both_and_they_go_on_to_the_same_weights(two_ranks, tmp_path, alone, options):
    folder = tmp_path / "run"
    assert two_ranks(train_on_rank, folder, SETTING | options, 4, 1) == [None, None]
    assert max(map(step_of, folder.glob("checkpoint-*"))) == 5
    weights = two_ranks(train_on_rank, folder, SETTING | options)
    assert_the_same(weights, folder, alone)


def test_a_loss_that_is_not_finite_on_one_rank_is_named_on_all(two_ranks, tmp_path):
    messages = two_ranks(train_damaged, tmp_path / "run")
    assert messages[0] == messages[1]
    assert "the loss of sample 3 (record 4) is not finite at stage 2, step " in messages[0]


def train_damaged(folder):
    with joined():
        trainer = trainer_of(folder, curriculum=curriculum_of(8, stages=2), per_device_train_batch_size=2, **SETTING)
        output = trainer.teacher.output

        def damaged(samples):
            said = output(samples)
            if any(sample.index == 3 for sample in samples) and trainer.progress.stage == 1:
                start = sum(len(s.response_ids) for s in samples[: [s.index for s in samples].index(3)])
                said.hidden[start] = float("nan")
            return said

        trainer.teacher.output = damaged
        try:
            trainer.train()
        except InputError as error:
            return str(error)


def test_distill_under_torchrun_makes_the_student_of_one_process(finished, tmp_path):
    inputs, alone = finished
    output = tmp_path / "out"
    device = "cpu" if torch.cuda.is_available() else None  # without a GPU "auto" is the CPU of both ranks
    words = [*options(inputs, batch_size=2, device=device), "--output", str(output)]  # of two ranks: 4, as alone
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pocl_fast.cli", "distill"]
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, *words], env=os.environ | quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (output, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)
    assert (output / "report.html").is_file()
    assert not list((output / "checkpoints").glob("checkpoint-*"))
    assert done.stdout.count("training speed:") == 1  # one rank speaks


DEEPSPEED = """
import sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
from tiny_training import curriculum_of, teacher_model, trainer_of
import torch.distributed as dist
from pathlib import Path

folder, stage, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
engine = {
    "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
trainer = trainer_of(
    folder, curriculum=curriculum_of(22, stages=2), teacher=teacher_model(), cache_dtype="fp32", max_steps=last,
    learning_rate=1e-3, logging_steps=1, fresh_optimizer=False, stage_weights="last",
    **({"deepspeed": engine, "per_device_train_batch_size": 2} if stage else {}),
)
trainer.train(resume_from_checkpoint=True)
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.full  # five processes that import DeepSpeed for each: a minute
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_losses_of_one_process_and_goes_on(tmp_path, stage):
    pytest.importorskip("deepspeed")
    (tmp_path / "train.py").write_text(DEEPSPEED, encoding="utf-8")
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])

    def run(launcher, *words):
        command = [sys.executable, *launcher, str(tmp_path / "train.py"), *map(str, words)]
        done = subprocess.run(
            command, env=os.environ | quiet | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]

    run([], tmp_path / "alone", 0, -1)
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run(ranks, tmp_path / "ranks", stage, 5)  # in the second stage
    run(ranks, tmp_path / "ranks", stage, -1)
    got, want = logged(tmp_path / "ranks"), logged(tmp_path / "alone")
    assert len(got) == len(want) > 9
    for record, exact in zip(got, want, strict=True):
        assert record == pytest.approx(exact, rel=1e-4)
