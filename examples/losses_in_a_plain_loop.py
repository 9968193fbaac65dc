"""The losses in a training loop of your own: plain PyTorch, no trainer and no run directory.

    python examples/losses_in_a_plain_loop.py [--steps 160]

A small teacher first learns to copy and to reverse strings of digits. Two equal students of half its layers learn from
it: one by `distillation_loss` (logits of both models), one by `linear_distillation_loss` (hidden states and lm_heads).
You will see cross-entropy (CE) and divergence fall, nats a token, with the same figures for both students. One minute.
"""

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pocl_fast import LinearTeacher, Objective, distillation_loss, linear_distillation_loss

LENGTH = 12  # of a string
COPY, REVERSE, VOCABULARY = 10, 11, 12  # tokens 0 to 9 are digits; two more say what to do with them


def small_llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))


def batch(generator: torch.Generator, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] tokens: digits, what to do, the result; [B, T] labels: the next token, -100 where it is no result."""
    digits = torch.randint(10, (size, LENGTH), generator=generator)
    task = torch.randint(COPY, REVERSE + 1, (size, 1), generator=generator)
    result = torch.where(task == COPY, digits, digits.flip(1))
    tokens = torch.cat([digits, task, result], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, LENGTH:-1] = result  # row i of the logits is judged against label i
    return tokens, labels


def train(model: Any, steps: int, loss_of: Any, name: str) -> None:
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        out = loss_of(*batch(generator))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % (steps // 4 or 1) == 0:
            figures = f"CE {out.ce:.3f}   divergence {out.divergence:.3f}   correct {out.metrics['accuracy']:4.0%}"
            print(f"{name:<30}step {step:4}   {figures}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each student")
    steps = parser.parse_args().steps
    teacher = small_llama(layers=4)

    def cross_entropy_alone(tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = teacher.model(tokens).last_hidden_state
        return linear_distillation_loss(hidden, teacher.lm_head.weight, None, labels, Objective(alpha=1.0))

    train(teacher, 3 * steps, cross_entropy_alone, "teacher, on the labels")
    teacher.requires_grad_(False)
    objective = Objective("forward_kl", temperature=2.0, alpha=0.3)  # 0.3 CE + 0.7 * 2**2 * KL(teacher || student)
    with_logits, with_hidden = small_llama(layers=2), small_llama(layers=2)

    def dense(tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        return distillation_loss(with_logits(tokens).logits, teacher(tokens).logits, labels, objective)

    def linear(tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        known = LinearTeacher(teacher.model(tokens).last_hidden_state, teacher.lm_head.weight)
        hidden = with_hidden.model(tokens).last_hidden_state
        return linear_distillation_loss(hidden, with_hidden.lm_head.weight, known, labels, objective)

    train(with_logits, steps, dense, "student, distillation_loss")
    train(with_hidden, steps, linear, "student, linear loss")


if __name__ == "__main__":
    main()
