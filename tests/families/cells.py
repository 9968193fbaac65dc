"""The cells of the matrix: what pocl-fast makes of a tiny model of a family, against transformers' own eager attention.

Every cell takes a family's name, and returns how the family is run: "packed", "padded" or "good". It fails where a
number is off, and lets `InputError` through: what pocl-fast refuses.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import arithmetic, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import TrainerCallback
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.pytorch_utils import Conv1D

from families.alone import (
    ALPHA,
    NEW_TOKENS,
    PAD,
    SAMPLES,
    TEMPERATURE,
    TOLERANCE,
    _logits,
    alone,
    check,
    check_each,
    eager_copy,
    forget,
    given,
    ids_of,
    logits_alone,
    pristine,
    random_ids,
)
from families.tiny_families import LAYERS, VOCABULARY, row_auto_class
from pocl_fast.answers.decoding import generate
from pocl_fast.curriculum.stages import baby_steps
from pocl_fast.cutting.cut import chosen_layers, cut_layers
from pocl_fast.data.packed import pack
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.records.samples import samples_from
from pocl_fast.run_directory.saved_student import save_student
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer


def logits(name: str) -> str:
    """The logits of a batch, as it is packed or padded."""
    model = given(name)
    packed = packing_ready(model, lambda _: None)
    with torch.no_grad():
        got = supervised_logits(model, pack(SAMPLES), packed=packed)
    check_each(got.float().split([len(one.response_ids) for one in SAMPLES]), logits_alone(name), "logits")
    return "packed" if packed else "padded"


class _Gradients(TrainerCallback):
    """Keeps each trainable parameter's gradient before the optimizer steps."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor | None] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in kwargs["model"].named_parameters()
            if p.requires_grad
        }


def _trainer(student: Any, teacher: Any, folder: Path, callback: Any) -> PoclTrainer:
    order = baby_steps(
        np.arange(len(SAMPLES)), np.zeros(len(SAMPLES)), stages=1, temperatures=[TEMPERATURE], alphas=[ALPHA]
    )
    config = PoclConfig(
        output_dir=str(folder), per_device_train_batch_size=len(SAMPLES), epochs_per_stage=1, precision="fp32",
        use_cpu=True, max_length=96, max_prompt_length=64, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", weight_decay=0.0, cache_dtype="fp32", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    data = SampleSet(samples_from(arithmetic(len(SAMPLES)), "tiny"), SAMPLES)
    return PoclTrainer(
        student, teacher, config, data, processing_class=tiny_tokenizer(), curriculum=order, callbacks=[callback]
    )


@functools.lru_cache(maxsize=1)
def other_side() -> tuple[Any, list[Tensor]]:
    """The teacher of all students, and its logits."""
    model = tiny_model(layers=2, seed=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model, alone(model)


def naive_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """alpha · CE + (1 - alpha) · temperature² · KL(teacher, student), from logits, a mean over all tokens."""
    s, t = torch.cat(list(student)), torch.cat(list(teacher))
    labels = torch.tensor([i for one in SAMPLES for i in one.response_ids])
    divergence = kl_div(
        log_softmax(s / TEMPERATURE, -1), log_softmax(t / TEMPERATURE, -1), log_target=True, reduction="batchmean"
    )
    return ALPHA * nll_loss(log_softmax(s, -1), labels) + (1 - ALPHA) * TEMPERATURE**2 * divergence


def _router_loss(model: Any) -> Tensor | float:
    """The loss of a mixture's routers over all tokens, where its configuration asks for it."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    seen = [model(input_ids=ids_of(one), use_cache=False).router_logits for one in SAMPLES]
    layers = tuple(torch.cat(parts) for parts in zip(*seen, strict=True))
    return config.router_aux_loss_coef * load_balancing_loss_func(
        layers, config.num_local_experts, config.num_experts_per_tok
    )


def _step(student: Any, reference: Any) -> str:
    """A step of training by PoclTrainer: its loss and gradient against those of `reference`, the same model."""
    teacher, teacher_logits = other_side()
    callback = _Gradients()
    reference.train()
    if not torch.equal(alone(reference, SAMPLES[:1])[0], alone(reference, SAMPLES[:1])[0]):
        reference.eval()  # experts that are drawn by chance while training: compared as it is without
        student.eval().train = lambda mode=True: student
    want = naive_loss(alone(reference), teacher_logits) + _router_loss(reference)
    if not want.requires_grad:
        return "none"  # transformers itself gives these parameters no gradient
    want.backward()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(student, copy.deepcopy(teacher), Path(folder), callback)
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 1
    check(torch.tensor(losses[0]), want.detach(), "the loss is")
    pairs = []
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            both = (callback.seen[name], parameter.grad)
            pairs.append((name, *(torch.zeros_like(parameter) if grad is None else grad for grad in both)))
    ours, theirs = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (1, 2))
    assert theirs.norm() > 0
    check(ours, theirs, "the gradient is")
    for part, mine, right in pairs:  # no small part is hidden by a large one, but for what is rounding of the whole
        wrong = float((mine - right).norm() / (right.norm() + 1e-2 * theirs.norm()))
        assert wrong < 10 * TOLERANCE, f"the gradient of {part} is off by {wrong:.1e}"
    return "packed" if trainer.packed else "padded"


def loss(name: str) -> str:
    """The student's loss and gradient in a step of training."""
    return _step(given(name), eager_copy(name))


def teacher(name: str) -> str:
    """The divergence from a teacher of this family, out of its cache."""
    generator = torch.Generator().manual_seed(7)
    tokens, width = sum(len(one.response_ids) for one in SAMPLES), 24
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    model = given(name)
    with tempfile.TemporaryDirectory() as folder:
        packing_ready(model, lambda _: None)
        source = Teacher(model, folder, cache_dtype=torch.float32, say=lambda _: None)
        weight = torch.randn(source.vocab_size, width, generator=generator) * 0.2
        source.fill(SAMPLES[1:3])  # the others are computed when they are asked for
        labels = torch.tensor([i for one in SAMPLES for i in one.response_ids])
        objective = Objective("forward_kl", temperature=TEMPERATURE, alpha=ALPHA)
        got = linear_distillation_loss(hidden, weight, source.output(SAMPLES), labels, objective).loss
        got.backward()
    mine = hidden.detach().clone().requires_grad_()
    want = naive_loss([mine @ weight.T], logits_alone(name))
    want.backward()
    check(got.detach(), want.detach(), "the loss is")
    check(hidden.grad, mine.grad, "the gradient is")
    return "packed" if source._packed else "padded"


def answers(name: str) -> str:
    """Greedy answers: prompts of several lengths, ends that come early, and prompts that begin alike."""
    apart = [random_ids(count, 50 + count) for count in (3, 20, 11, 37)]
    head = random_ids(12, 90)
    alike = [head + random_ids(count, 60 + count) for count in (2, 9, 21, 30)]
    model, reference = given(name), pristine(name)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "pad_id": PAD, "batch_size": 8}
    whole = generate(model, apart, end_ids=(), **options)
    _check_answers(reference, apart, whole, end=None)
    end = _early_end(whole)
    _check_answers(reference, apart, generate(model, apart, end_ids=(end,), **options), end=end)
    end = _third_token(reference, alike[1])
    _check_answers(reference, alike, generate(model, alike, end_ids=(end,), **options), end=end)
    return "good"


@torch.no_grad()
def _third_token(model: Any, prompt: list[int]) -> int:
    """The third token of the greedy answer, or a later one that is not among those before it."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS - 2):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        answer = tokens[len(prompt) :]
        if len(answer) > 2 and answer[-1] not in answer[:-1]:
            break
    return tokens[-1]


def _early_end(answers: Sequence[Sequence[int]]) -> int:
    """A token at which one answer ends early, and another later or not at all, where there is one."""
    for place in range(2, NEW_TOKENS - 2):
        for answer in answers:
            stops = {other.index(answer[place]) if answer[place] in other else NEW_TOKENS for other in answers}
            if len(stops) > 1:
                return answer[place]
    return answers[0][NEW_TOKENS // 2]


@torch.no_grad()
def _check_answers(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], end: int | None) -> None:
    """Each token, and the end, is the most likely one by the model's logits over prompt and answer in one piece."""
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*answer, *([end] if end is not None and len(answer) < NEW_TOKENS else [])]
        assert len(answer) == NEW_TOKENS or end is not None, f"an answer of {len(answer)} tokens without an end"
        assert end not in answer
        logits = _logits(model, torch.tensor([prompt + tokens]))[len(prompt) - 1 : -1]
        rows = torch.arange(len(tokens))
        gap = (logits.max(-1).values - logits[rows, torch.tensor(tokens)]) / logits.norm(dim=-1)
        wrong = (gap > TOLERANCE).nonzero().flatten().tolist()
        if wrong and tokens != _by_transformers(model, prompt, len(tokens)):
            raise AssertionError(f"token {wrong[0]} of the answer to a prompt of {len(prompt)} tokens is another")


def _by_transformers(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy answer, whose cache is what counts where positions depend on the length so far."""
    ids = torch.tensor([prompt])
    forget(model)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return made[0, len(prompt) :].tolist()


def cut(name: str) -> str:
    """A student of half the layers, against the whole model with the other layers skipped; and it can be saved."""
    model, reference = given(name), eager_copy(name)
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", LAYERS)
    keep = layers // 2
    smaller = cut_layers(model, keep)
    stack = layer_stack(reference, layers)
    chosen = chosen_layers(model, keep)
    for i, layer in enumerate(stack):
        if i not in chosen:
            layer.register_forward_hook(_skipped, with_kwargs=True)
    with torch.no_grad():
        want = alone(reference)
        assert layer_stack(smaller, keep)
        check_each(alone(smaller), want, "logits")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        smaller.save_pretrained(folder)
        again = type(smaller).from_pretrained(folder, attn_implementation="eager")
        check_each(alone(again), want, "after saving, logits")
    return "good"


def _skipped(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


def layer_stack(model: Any, count: int) -> Any:
    """The list of the decoder's `count` layers, and not of what sees pictures."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not re.search("vis|image|audio", name):
            return module
    raise AssertionError(f"no list of {count} layers")


def reload(name: str) -> str:
    """A trained student that was saved as a run saves it, read by transformers alone."""
    model, reference = given(name), eager_copy(name)
    packing_ready(model, lambda _: None, trains=True)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():  # as training does, every parameter moves
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            change = torch.randn(ours.shape, generator=generator) * 0.02
            if change.shape[0] == VOCABULARY:
                change[PAD] = 0  # which some families make zeros when they are read
            ours.add_(change)
            theirs.add_(change)
        want = alone(reference)
        with tempfile.TemporaryDirectory() as folder:
            save_student(model, tiny_tokenizer(), Path(folder), merges=False, say=lambda _: None)
            again = _read(row_auto_class(name), type(model), Path(folder) / "student")
        check_each(alone(again.eval()), want, "logits")
    return "good"


def _read(auto: Any, kind: Any, folder: Path) -> Any:
    """A saved model, read by transformers: by its class where the auto class does not know its configuration."""
    known = type(kind.config_class()) in auto._model_mapping
    return (auto if known else kind).from_pretrained(folder, attn_implementation="eager")


def lora(name: str) -> str:
    """The loss of a student with adapters that are not zero, and its gradient at the adapters."""
    return _step(adapted(given(name)), adapted(eager_copy(name)))


def adapted(model: Any) -> Any:
    """The model with LoRA on its linear layers but the lm_head, where peft takes them."""
    import peft

    mamba = any(name in type(model).__module__ for name in ("mamba", "falcon_h1", "nemotron_h"))
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not re.search("Router|Grouped", type(module).__name__)  # more than a matrix, of which peft knows nothing
        and module is not model.get_output_embeddings()
        and not (mamba and name.endswith("out_proj"))  # which peft refuses: Mamba's kernels read its weight
    ]
    config = peft.LoraConfig(r=4, lora_alpha=2, lora_dropout=0.0, target_modules=names, init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config)


CELLS: dict[str, Callable[[str], str]] = {
    "logits": logits, "loss": loss, "teacher": teacher, "answers": answers, "cut": cut, "reload": reload, "lora": lora,
}  # fmt: skip
