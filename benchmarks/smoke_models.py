"""What smoke_gpu.py checks of attention over packed rows, of whole models and of training, and of the GPU itself.

As smoke_checks.py does of losses. The float64 side of a model is the same model in float64, with transformers' eager
attention (whose softmax is fp32), each sample alone.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from smoke_checks import (
    ALPHA,
    BF16,
    FP16,
    FP32,
    FP32_LOGITS,
    FP32_SUMS,
    TEMPERATURE,
    Absent,
    Check,
    Figure,
    Setting,
    distance,
    in_float64,
    objective_of,
    rounding,
    short,
    some_head,
    some_labels,
)
from torch import Tensor, nn

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher

LEARNING_RATE = 2e-3

# ---- attention ----


def varlen(setting: Setting, dtype: torch.dtype, size: int, window: int | None) -> list[Figure]:
    """torch's flash attention over a packed row, 8 heads over 2 of keys and values, against each sample alone."""
    setting.needs_gpu("varlen_attn runs on a GPU alone")
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later have it

    lengths = (1, 37, 128, 200, 513, 64)
    T = sum(lengths)
    q, k, v, out_grad = (torch.randn(T, heads, size, device=setting.kind).to(dtype) for heads in (8, 2, 2, 8))
    leaves, exact = [x.requires_grad_(True) for x in (q, k, v)], [in_float64(x) for x in (q, k, v)]
    ends = torch.tensor((0, *lengths), device=setting.kind).cumsum(0).to(torch.int32)
    fewer_heads = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    behind = -1 if window is None else window
    got = varlen_attn(
        *leaves, ends, ends, max(lengths), max(lengths), window_size=(behind, 0), scale=size**-0.5, **fewer_heads
    )
    want = torch.cat([attention(*parts, window) for parts in zip(*(x.split(lengths) for x in exact), strict=True)])
    got.backward(out_grad)
    want.backward(out_grad.double())
    # the weights of the values and the result are rounded; backward rounds two more factors
    figures = [Figure("output", distance(got, want), 2 * rounding(dtype))]
    pairs = zip(("query", "key", "value"), leaves, exact, strict=True)
    return figures + [
        Figure(f"gradient by {name}", distance(x.grad, y.grad), 4 * rounding(dtype)) for name, x, y in pairs
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal, of one sample: [L, heads, size]; a token sees itself and `window` before it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    places = torch.arange(len(q), device=q.device)
    behind = places[:, None] - places[None]
    seen = (behind >= 0) & (behind <= (len(q) if window is None else window))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


# ---- packed models ----


def tiny_config(family: str, vocabulary: int, layers: int = 2) -> Any:
    """4 heads of 64 over 2 of keys and values; random weights that keep the size of what they are given."""
    import transformers

    sizes = {
        "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.06,
        "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    kind = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}[family]
    window = {"sliding_window": 16} if family == "mistral" else {}
    return getattr(transformers, kind)(**sizes, **window)


def some_samples(setting: Setting, vocabulary: int) -> list[Any]:
    from pocl_fast.data.encoded import EncodedSample

    sizes = [(5, 20), (1, 2), (60, 70), (30, 1), (3, 9)]  # prompt, response
    sizes = [*sizes, (200, 313), (128, 128), (17, 111)] if setting.kind == "cuda" else sizes
    rows = [torch.randint(2, vocabulary, (p + r,)).tolist() for p, r in sizes]
    return [
        EncodedSample(i, tuple(row[:p]), tuple(row[p:]), False)
        for i, (row, (p, _)) in enumerate(zip(rows, sizes, strict=True))
    ]


def packed_model(setting: Setting, family: str, dtype: torch.dtype) -> list[Figure]:
    """Logits at the supervised positions, and all gradients of a random sum of them."""
    from transformers import AutoModelForCausalLM

    from pocl_fast.data.packed import pack
    from pocl_fast.models.packed_attention import enable_packing
    from pocl_fast.models.packed_forward import supervised_logits

    vocabulary = 1000
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocabulary)).to(setting.kind, dtype).eval()
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    enable_packing(model)
    samples = some_samples(setting, vocabulary)
    got = supervised_logits(model, pack(samples).to(setting.kind), packed=True)
    alone = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids], device=setting.kind)
        alone.append(exact(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1])
    want = torch.cat(alone)
    direction = torch.randn_like(want).to(dtype)
    (got * direction).float().sum().backward()
    (want * direction.double()).sum().backward()
    # some 50 roundings follow one another, whose mean is 0.4 of the most, and add up as random numbers do: 1.1e-2 in
    # bf16; attention to another sample's tokens would be off by 0.1
    tolerance = 5 * rounding(dtype) if dtype == BF16 else 1e-5  # fp32: the sums' roundings; TF32 would be off by 1e-3
    by = f" ({model.config._attn_implementation})"
    figures = [Figure("logits" + by, distance(got, want), tolerance)]
    for what, of_attention in (("gradients of attention", True), ("other gradients", False)):
        pair = [gradients_of(m, of_attention) for m in (model, exact)]
        figures.append(Figure(what, distance(*pair), 1.5 * tolerance))
    return figures


def gradients_of(model: nn.Module, of_attention: bool) -> Tensor:
    """One behind the other, in float64."""
    parameters = [p for name, p in model.named_parameters() if ("self_attn" in name) == of_attention]
    return torch.cat([p.grad.double().flatten() for p in parameters])  # type: ignore[union-attr]


# ---- training ----


def training(setting: Setting) -> list[Figure]:
    """The losses of four steps of PoclTrainer in its own precision, against a plain loop in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    from pocl_fast.data.encoding import EncodedSample

    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    student, teacher = (AutoModelForCausalLM.from_config(tiny_config("llama", size, n)).eval() for n in (1, 2))
    plain = copy.deepcopy(student), copy.deepcopy(teacher)
    prompts = torch.randint(2, size, (16, 8)).tolist()
    text = torch.randint(2, 50, (80,)).tolist()  # all responses are parts of it, so that there is something to learn
    encoded = [EncodedSample(i, tuple(p), tuple(text[i : 2 * i + 12]), False) for i, p in enumerate(prompts)]
    losses, batches = trained(setting, student, teacher, tokenizer, encoded)
    untrained = [plain_loss(*plain, batch).item() for batch in batches]
    want = plain_losses(*plain, batches)
    # 1e-3 in bf16, by its roundings in each step and those that turned the sign of an entry's first steps
    tolerance = rounding(BF16)
    moved = distance(torch.tensor(untrained), torch.tensor(want))
    if moved < 10 * tolerance:
        raise RuntimeError(f"four steps moved the losses by {moved:.1e} alone: too little for this check to see a step")
    return [Figure(f"losses of {len(losses)} steps", distance(torch.tensor(losses), torch.tensor(want)), tolerance)]


def trained(
    setting: Setting, student: Any, teacher: Any, tokenizer: Any, encoded: list[Any]
) -> tuple[list[float], list[list[Any]]]:
    """The losses of PoclTrainer's four steps on 16 samples, and the batches that it made of them."""
    from transformers import TrainerCallback

    from pocl_fast import PoclConfig, PoclTrainer, SampleSet
    from pocl_fast.curriculum.stages import no_curriculum
    from pocl_fast.records.samples import Sample

    losses: list[float] = []

    class Losses(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    samples = [Sample(i, i + 1, ({"role": "user", "content": "?"},), ("!",)) for i in range(len(encoded))]
    with tempfile.TemporaryDirectory() as folder:
        config = PoclConfig(
            output_dir=folder, per_device_train_batch_size=4, epochs_per_stage=1, learning_rate=LEARNING_RATE,
            weight_decay=0.0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", eval_strategy="no",
            use_cpu=setting.kind == "cpu", max_length=64, max_prompt_length=32, max_new_tokens=2,
        )  # fmt: skip
        trainer = PoclTrainer(
            student, teacher, config, SampleSet(samples, encoded), processing_class=tokenizer,
            curriculum=no_curriculum(len(encoded), temperature=TEMPERATURE, alpha=ALPHA), callbacks=[Losses()],
        )  # fmt: skip
        schedule = trainer.planned()
        batches = [[encoded[i] for i in schedule.batch(step, 0)] for step in range(schedule.total_steps)]
        trainer.train()
    return losses, batches


def plain_loss(student: Any, teacher: Any, batch: Sequence[Any]) -> Tensor:
    """The mean over the batch's response tokens, by hand, each sample alone."""
    terms = []
    for sample in batch:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        of_response = slice(len(sample.prompt_ids) - 1, -1)
        s = student(input_ids=ids).logits[0, of_response]
        with torch.no_grad():
            log_p = (teacher(input_ids=ids).logits[0, of_response] / TEMPERATURE).log_softmax(-1)
        ce = nn.functional.cross_entropy(s, torch.tensor(sample.response_ids), reduction="none")
        D = (log_p.exp() * (log_p - (s / TEMPERATURE).log_softmax(-1))).sum(-1)
        terms.append(ALPHA * ce + (1 - ALPHA) * TEMPERATURE**2 * D)
    return torch.cat(terms).mean()


def plain_losses(student: Any, teacher: Any, batches: Sequence[Any]) -> list[float]:
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = plain_loss(student, teacher, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def byte_tokenizer() -> Any:
    """Every byte a token, and two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


# ---- what only a GPU has ----


class Step:
    """A loss and its backward on tensors that stay where they are; the kernels are those of the other jobs."""

    def __init__(self, setting: Setting, kind: str) -> None:
        setting.needs_gpu("a CPU has no streams, graphs or waits")
        self.setting, self.kind = setting, kind
        N, V, H = setting.N, setting.V, setting.H
        self.tau = torch.tensor([TEMPERATURE], device=setting.kind)
        self.labels = some_labels(setting, N, V)
        if kind == "dense":
            student, self.teacher = (torch.randn(2, N, V, device=setting.kind) * 3).to(BF16)
            self.leaves = [student.requires_grad_(True)]
        else:
            hidden, self.teacher = torch.randn(2, N, H, device=setting.kind).to(BF16)
            self.head = some_head(setting, V, H)
            self.leaves = [x.requires_grad_(True) for x in (hidden, some_head(setting, V, H))]

    def run(self, leaves: Sequence[Tensor] | None = None, *, exact: bool = False) -> Tensor:
        leaves = self.leaves if leaves is None else leaves
        for leaf in leaves:
            leaf.grad = None
        objective = Objective("jsd", temperature=self.tau.double() if exact else self.tau, alpha=ALPHA)
        teacher = self.teacher.double() if exact else self.teacher
        backend: Any = "reference" if exact else self.setting.backend
        if self.kind == "dense":
            loss = distillation_loss(leaves[0], teacher, self.labels, objective, backend=backend).loss
        else:
            head = LinearTeacher(teacher, self.head.double() if exact else self.head)
            most = {} if exact else {"max_supervised": self.setting.N * 3 // 4}
            loss = linear_distillation_loss(*leaves, head, self.labels, objective, backend=backend, **most).loss
        loss.backward()
        return loss

    def change(self) -> None:
        """Other numbers in the same memory."""
        with torch.no_grad():
            for x in (*self.leaves, self.teacher):
                x.copy_(x.flip(0) * 0.75)
            self.tau.fill_(2.0)
            self.labels.copy_(self.labels.flip(0))


def without_waiting(setting: Setting, kind: str) -> list[Figure]:
    """Raises where loss or backward wait for the GPU, by torch's own check."""
    step = Step(setting, kind)
    step.run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return against_exact(step, loss, [leaf.grad for leaf in step.leaves])


def captured(setting: Setting, kind: str) -> list[Figure]:
    """A CUDA graph of a step, replayed on other numbers and at another temperature."""
    step = Step(setting, kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.run()
    gradients = [leaf.grad for leaf in step.leaves]
    step.change()
    graph.replay()
    torch.cuda.synchronize()
    return against_exact(step, loss, gradients)


def against_exact(step: Step, loss: Tensor, gradients: Sequence[Tensor | None]) -> list[Figure]:
    exact = [in_float64(leaf) for leaf in step.leaves]
    want = step.run(exact, exact=True)
    # as in smoke_checks.py: rounded once, or on its way into a product and after it
    tolerance = rounding(BF16) + 1e-5 if step.kind == "dense" else 2**0.5 * rounding(BF16)
    figures = [Figure("loss", distance(loss, want), FP32_SUMS if step.kind == "dense" else FP32_LOGITS)]
    names = ("logits",) if step.kind == "dense" else ("hidden", "weight")
    pairs = zip(names, gradients, exact, strict=True)
    return figures + [Figure(f"gradient by {name}", distance(g, x.grad), tolerance) for name, g, x in pairs]  # type: ignore[arg-type]


def past_32_bits(setting: Setting) -> list[Figure]:
    """15000 x 151936 logits, more than 2^31: every token's loss, and the gradient before, at and past 2^31 bytes and
    elements. Backward multiplies it by 2, which bf16 holds exactly."""
    setting.needs_gpu("14 GB of logits, too much for a CPU")
    N, V = 15000, setting.V
    if (free := torch.cuda.mem_get_info()[0]) < 20e9:
        raise Absent(f"needs 20 GB of the GPU's memory, {free / 1e9:.0f} are free")
    student, teacher = (torch.empty(N, V, dtype=BF16, device=setting.kind).normal_(std=3) for _ in range(2))
    labels, objective = some_labels(setting, N, V), objective_of("forward_kl")
    student.requires_grad_(True)
    out = distillation_loss(student, teacher, labels, objective, backend=setting.backend)
    (2 * out.loss).backward()
    losses = []
    for part in (slice(n, n + 250) for n in range(0, N, 250)):
        with torch.no_grad():
            s, t = student[part].double(), teacher[part].double()
            exact = distillation_loss(s, t, labels[part], objective, reduction="none", backend="reference")
            losses.append(exact.loss)
    want = torch.cat(losses).sum() / out.num_tokens
    figures = [Figure("loss", distance(out.loss, want), FP32_SUMS)]
    for elements in (0, 2**30, 2**31, N * V):
        first = min(max(elements // V - 4, 0), N - 8)
        part = slice(first, first + 8)
        s = in_float64(student[part])
        exact = distillation_loss(
            s, teacher[part].double(), labels[part], objective, reduction="sum", backend="reference"
        )
        (2 * exact.loss / out.num_tokens).backward()
        error = distance(student.grad[part], s.grad)  # type: ignore[index]
        figures.append(Figure(f"gradient of rows {first} to {first + 7}", error, rounding(BF16) + 1e-5))
    return figures


# ---- the jobs ----


def jobs(setting: Setting) -> dict[str, Callable[[], list[Check]]]:
    cases = [(dtype, size, window) for dtype in (BF16, FP16) for size in (64, 128) for window in (None, 16)]
    models = [("llama", BF16), ("qwen3", BF16), ("mistral", BF16), ("llama", FP32)]
    steps = [(kind, way) for kind in ("dense", "linear") for way in (without_waiting, captured)]
    return {
        "training": lambda: [("four steps", partial(training, setting))],
        "packing": lambda: [(f"{f} {short(dtype)}", partial(packed_model, setting, f, dtype)) for f, dtype in models],
        "past 2^31": lambda: [("forward KL, bf16", partial(past_32_bits, setting))],
        "graphs": lambda: [(f"{kind}, {way.__name__}", partial(way, setting, kind)) for kind, way in steps],
        "varlen": lambda: [
            (f"{short(dtype)}, heads of {size}, window {window}", partial(varlen, setting, dtype, size, window))
            for dtype, size, window in cases
        ],
    }
