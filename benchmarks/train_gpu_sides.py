"""What train_gpu.py trains, and each side's way to do it: shapes and the flops that a step needs, random models and
samples, PoclTrainer, a padded loop by hand, and Liger's losses in that loop.

Does not know what is measured: a side calls `step_done` after each step, and gives the losses.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from device import Device
from torch import Tensor

from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.stages import no_curriculum
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.sample_set import SampleSet

LEARNING_RATE, SEED = 1e-4, 42
STUDENT_SEED, TEACHER_SEED, DATA_SEED = 1, 2, 3
Step = list[EncodedSample]  # the samples of a step


class Absent(Exception):
    """A side cannot run here."""


# -- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers, as transformers' Qwen3 or Llama."""

    kind: str  # transformers' model_type
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool = True  # whether the lm_head is the embeddings

    @property
    def body_weights(self) -> int:
        """Weights in the matrix products of all layers; embeddings and lm_head are not among them."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)  # q and o, k and v
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def head_flops(self, supervised: int) -> int:
        """The lm_head's product, over the supervised positions alone."""
        return 2 * self.vocabulary * self.hidden * supervised

    def forward_flops(self, lengths: Iterable[int], supervised: int) -> int:
        """Of one forward over samples of these lengths, with logits at the supervised positions.

        2 for each weight and token; in attention 4 for each entry of a head and each pair of positions of which one
        sees the other (2 for the score, 2 for the sum of values): a sample of n tokens has n (n + 1) / 2 pairs.
        """
        lengths = list(lengths)
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        attention = 4 * self.layers * self.heads * self.head_size * pairs
        return 2 * self.body_weights * sum(lengths) + attention + self.head_flops(supervised)


@dataclass(frozen=True)
class Pair:
    """A teacher and its student."""

    teacher: Shape
    student: Shape

    def step_flops(self, lengths: Iterable[int], supervised: int, *, teacher_runs: bool) -> int:
        """What a step needs, whatever a side computes besides (padding, logits of prompts): the student's forward,
        twice that for its backward, and the teacher's forward, or its lm_head alone where its hidden states are kept.
        """
        lengths = list(lengths)
        teacher = self.teacher
        extra = teacher.forward_flops(lengths, supervised) if teacher_runs else teacher.head_flops(supervised)
        return 3 * self.student.forward_flops(lengths, supervised) + extra


# of the models' public config.json
QWEN3 = {
    "0.6b": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
    "1.7b": Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936),
    "4b": Shape("qwen3", 2560, 36, 32, 8, 128, 9728, 151936),
    "8b": Shape("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, tied=False),
}
LLAMA32 = {
    "1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "3b": Shape("llama", 3072, 28, 24, 8, 128, 8192, 128256),
}
SHAPES = {
    "qwen3-1.7b-0.6b": Pair(QWEN3["1.7b"], QWEN3["0.6b"]),
    "qwen3-4b-0.6b": Pair(QWEN3["4b"], QWEN3["0.6b"]),
    "qwen3-8b-1.7b": Pair(QWEN3["8b"], QWEN3["1.7b"]),
    "llama3.2-3b-1b": Pair(LLAMA32["3b"], LLAMA32["1b"]),
    "tiny": Pair(Shape("qwen3", 64, 4, 4, 2, 16, 192, 1000), Shape("qwen3", 64, 2, 4, 2, 16, 128, 1000)),
}


def product_speed(device: Device) -> float:
    """Flops a second of a large product: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.kind == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device.kind, dtype=dtype) for _ in range(2))
    times = [device.milliseconds(lambda: a @ b) for _ in range(13)]
    return 2e3 * n**3 / statistics.median(times[3:])


# -- models and data --------------------------------------------------------------------------------------------------


def build(shape: Shape, kind: str, dtype: torch.dtype, seed: int) -> Any:
    """A causal language model of random weights, the same for the same seed, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.kind,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.hidden**-0.5,  # logits of standard deviation 1
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(kind):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(kind)


def random_samples(count: int, lengths: tuple[int, int], vocabulary: int) -> list[EncodedSample]:
    """Of random tokens; lengths are uniform within the bounds, and a quarter to three quarters of each is prompt."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    samples = []
    for index in range(count):
        n = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        prompt = int(torch.randint(n // 4, 3 * n // 4 + 1, (), generator=generator))
        ids = torch.randint(vocabulary, (n,), generator=generator).tolist()
        samples.append(EncodedSample(index, tuple(ids[:prompt]), tuple(ids[prompt:]), False))
    return samples


def tokenizer() -> Any:
    """The least that a trainer asks for; the samples are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "<unknown>": 2}, unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>")


@dataclass
class Run:
    """What every side is given: models, and the batches of two epochs in PoclTrainer's order."""

    pair: Pair
    kind: str  # of the device
    batch: int  # samples
    samples: list[EncodedSample]
    steps: list[Step]

    @classmethod
    def of(cls, pair: Pair, kind: str, batch: int, epoch_steps: int, lengths: tuple[int, int]) -> Run:
        samples = random_samples(epoch_steps * batch, lengths, pair.student.vocabulary)
        plan = no_curriculum(len(samples), temperature=1.0, alpha=0.0)
        tokens = {sample.index: len(sample) for sample in samples}
        schedule = Schedule(plan, tokens, BatchSize(batch), seed=SEED, epochs=2)
        steps = [[samples[i] for i in schedule.batch(step, 0)] for step in range(schedule.total_steps)]
        return cls(pair, kind, batch, samples, steps)

    def facts(self, epoch_steps: int) -> dict[str, Any]:
        """Sizes, for a result to name."""
        tokens = sum(map(len, self.samples))
        rectangles = sum(len(step) * max(map(len, step)) for step in self.steps[:epoch_steps])
        return {
            "batch": self.batch,
            "samples": len(self.samples),
            "tokens_a_step": tokens / epoch_steps,
            "supervised_a_step": sum(len(sample.response_ids) for sample in self.samples) / epoch_steps,
            "padding": 1 - tokens / rectangles,
        }

    def student(self) -> Any:
        return build(self.pair.student, self.kind, torch.float32, STUDENT_SEED).train()

    def teacher(self) -> Any:
        dtype = torch.bfloat16 if self.kind == "cuda" else torch.float32
        return build(self.pair.teacher, self.kind, dtype, TEACHER_SEED).eval().requires_grad_(False)


def free_memory(kind: str) -> None:
    gc.collect()  # a trainer and its callbacks refer to each other
    if kind == "cuda":
        torch.cuda.empty_cache()


# -- ours -------------------------------------------------------------------------------------------------------------


def train_ours(run: Run, step_done: Callable[[], None]) -> tuple[list[float], int]:
    """PoclTrainer over two epochs: the losses, and the pieces that it cut its batches into for want of memory."""
    from transformers import TrainerCallback

    from pocl_fast import PoclConfig, PoclTrainer

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_done()

    losses, seen = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = PoclConfig(
            output_dir=folder,
            per_device_train_batch_size=run.batch,
            epochs_per_stage=2,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            seed=SEED,
            save_strategy="no",
            disable_tqdm=True,
            precision="auto" if run.kind == "cuda" else "fp32",
            use_cpu=run.kind == "cpu",
        )
        trainer = PoclTrainer(
            run.student(),
            run.teacher(),  # held by nobody else, so that the trainer's letting go of its body frees it
            options,
            SampleSet([], run.samples),
            processing_class=tokenizer(),
            curriculum=no_curriculum(len(run.samples), temperature=1.0, alpha=0.0),
            callbacks=[AfterStep()],
        )
        training_step = trainer.training_step

        def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = training_step(model, inputs, *args, **kwargs)
            losses.append(loss.detach().clone())  # to be read at the end: reading waits for the GPU
            seen.append(inputs.samples)
            return loss

        trainer.training_step = noted
        trainer.train()
    if seen != run.steps:
        raise RuntimeError("the trainer's batches are not those of the other sides")
    return torch.stack(losses).tolist(), trainer._halving.count


# -- padded sides -----------------------------------------------------------------------------------------------------


@dataclass
class Rectangle:
    """Samples padded on the right to the longest, [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor  # bool: the token after this position is supervised
    where: Tensor  # [N] these positions in the flattened rectangle
    labels: Tensor  # [N]

    @classmethod
    def of(cls, samples: Step, device: str) -> Rectangle:
        rows = [torch.tensor(sample.prompt_ids + sample.response_ids) for sample in samples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place = torch.arange(ids.shape[1])
        ends = torch.tensor([len(sample) for sample in samples])[:, None]
        starts = torch.tensor([len(sample.prompt_ids) for sample in samples])[:, None]
        predicts = (place >= starts - 1) & (place < ends - 1)
        labels = torch.tensor([token for sample in samples for token in sample.response_ids])
        parts = (ids, (place < ends).long(), predicts, predicts.flatten().nonzero()[:, 0], labels)
        return cls(*(part.to(device) for part in parts))

    def into(self, model: Any) -> Any:
        return model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)

    def hidden(self, model: Any) -> Tensor:
        """[N, H] final hidden states at the positions that predict a supervised token."""
        return self.into(model.get_decoder()).last_hidden_state.flatten(0, 1)[self.where]


# of a student, a teacher and a rectangle: the mean of forward KL over the supervised tokens
PaddedLoss = Callable[[Any, Any, Rectangle], Tensor]


def plain_loss(student: Any, teacher: Any, rectangle: Rectangle) -> Tensor:
    """What one would write by hand."""
    with torch.no_grad():
        log_p = torch.log_softmax(rectangle.into(teacher).logits, -1, dtype=torch.float32)
    log_q = torch.log_softmax(rectangle.into(student).logits, -1, dtype=torch.float32)
    per_token = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (per_token * rectangle.predicts).sum() / len(rectangle.labels)


def liger_loss(side: str, kind: str) -> PaddedLoss:
    """Liger's fused linear losses at beta 0, which is forward KL in both: "liger" is LigerFusedLinearJSDLoss,
    "liger-compiled" the same compiled, its default; "liger-kernel" is LigerFusedLinearJSD, of bf16 hidden states and
    weights, its fast path, with the weight's gradient summed in fp32."""
    if side != "liger" and kind != "cuda":
        raise Absent("its kernels need a GPU" if side == "liger-kernel" else "compiling for a CPU takes too long")
    try:
        if side == "liger-kernel":
            from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

            fused: Any = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)
        else:
            from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

            fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=side == "liger-compiled")
    except ImportError as error:
        raise Absent(f"liger-kernel cannot be imported: {error}") from error

    def loss(student: Any, teacher: Any, rectangle: Rectangle) -> Tensor:
        with torch.no_grad():
            theirs = rectangle.hidden(teacher)
        ours, weight = rectangle.hidden(student), student.get_output_embeddings().weight
        if side == "liger-kernel":
            ours, weight = ours.to(theirs.dtype), weight.to(theirs.dtype)
        return fused(ours, weight, theirs, teacher.get_output_embeddings().weight, rectangle.labels)

    return loss


def train_padded(
    side: str, run: Run, steps: int, restart: Callable[[], None], step_done: Callable[[], None]
) -> tuple[list[float], int]:
    """So many steps, each in as few pieces, whose gradients add up, as the memory asks for: the losses, and the pieces.
    `restart` is called where it begins anew with more of them."""
    loss = plain_loss if side == "plain" else liger_loss(side, run.kind)
    pieces = 1
    while True:
        try:
            return train_in_pieces(loss, run, steps, pieces, step_done), pieces
        except torch.OutOfMemoryError:
            if pieces >= run.batch:
                raise
        pieces *= 2
        restart()
        free_memory(run.kind)


def train_in_pieces(loss: PaddedLoss, run: Run, steps: int, pieces: int, step_done: Callable[[], None]) -> list[float]:
    student, teacher = run.student(), run.teacher()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses = []
    for step in run.steps[:steps]:
        supervised = sum(len(sample.response_ids) for sample in step)
        values = []
        for part in (step[k::pieces] for k in range(pieces)):
            rectangle = Rectangle.of(part, run.kind)
            with torch.autocast(run.kind, dtype=torch.bfloat16, enabled=run.kind == "cuda"):
                value = loss(student, teacher, rectangle) * (len(rectangle.labels) / supervised)
            value.backward()
            values.append(value.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(values).sum())
        step_done()
    return torch.stack(losses).tolist()
