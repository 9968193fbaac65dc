"""`PoclTrainer` with LoRA: only small adapters of the student are trained, its own weights stay as they are.

    python examples/trainer_with_lora.py [--steps 30]

The teacher is the bundled SmolLM2-135M. The student is 20 of its 30 layers, and speaks badly after the cut; adapters
(peft) learn to repair it. You will see the loss fall stage by stage, ROUGE-L on held-out questions before and after,
and one answer of each. Needs peft. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peft import LoraConfig
from smollm2 import cut, load_smollm2

from pocl_fast import PoclConfig, PoclTrainer

ANIMALS = {
    "a dog": "barks", "a cat": "meows", "a cow": "moos", "a bee": "buzzes", "a lion": "roars", "a duck": "quacks",
    "a horse": "neighs", "a snake": "hisses", "a frog": "croaks", "an owl": "hoots", "a pig": "oinks", "a fox": "yelps",
}  # fmt: skip
QUESTIONS = ("What sound does {} make?", "How does {} sound?", "Say in one sentence what sound {} makes.")


def main() -> None:
    parser = argparse.ArgumentParser(description="PoclTrainer with LoRA")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each of the two stages")
    steps = parser.parse_args().steps
    samples = [
        {"prompt": question.format(animal), "response": f"{animal[0].upper()}{animal[1:]} {sound}."}
        for question in QUESTIONS
        for animal, sound in ANIMALS.items()
    ]
    held_out = samples[::6]
    folder = Path(tempfile.mkdtemp(prefix="lora-"))
    teacher, tokenizer = load_smollm2()
    trainer = PoclTrainer(
        model=cut(teacher, 20),
        teacher=teacher,
        args=PoclConfig(
            str(folder),
            stages=2,  # first the easier half of the samples, then all
            steps_per_stage=steps,
            per_device_train_batch_size=6,
            learning_rate=2e-3,
            max_new_tokens=16,
            disable_tqdm=True,
        ),
        train_dataset=[sample for sample in samples if sample not in held_out],
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.model.print_trainable_parameters()
    before, first_answer = trainer.evaluate(), trainer.dev_answers[0]
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(folder / "adapters"))
    print(f"\nROUGE-L of {len(held_out)} held-out answers: {before['eval_rouge_l']:.1f} -> {after['eval_rouge_l']:.1f}")
    print(held_out[0]["prompt"])
    print(f"  before: {first_answer!r}\n  after:  {trainer.dev_answers[0]!r}")
    files = ", ".join(f"{p.name} ({p.stat().st_size / 2**20:.1f} MiB)" for p in sorted((folder / "adapters").iterdir()))
    print(f"{folder / 'adapters'}: {files}")


if __name__ == "__main__":
    main()
