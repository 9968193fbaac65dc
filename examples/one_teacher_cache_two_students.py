"""Two students of one teacher, which runs only once: the second training reads what the first one kept of it.

    python examples/one_teacher_cache_two_students.py [--steps 24]

The teacher is the bundled SmolLM2-135M; the students are six and ten of its 30 layers. The first training runs the
teacher on each sample that it meets for the first time, and writes the teacher's last hidden states to disk. When all
samples are there, the teacher's layers leave memory. The second training never runs them. You will see each training's
log, and at the end the time and the number of runs of the teacher for each. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from smollm2 import cut, load_smollm2

from pocl_fast import PoclConfig, PoclTrainer, Teacher

COUNTRIES = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Kenya": "Nairobi", "Cuba": "Havana", "Greece": "Athens", "Poland": "Warsaw", "Iran": "Tehran",
}  # fmt: skip
QUESTIONS = ("What is the capital of {}?", "Name the capital of {}.", "{}: which city is its capital?")


def main() -> None:
    parser = argparse.ArgumentParser(description="one teacher cache, two students")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each student")
    steps = parser.parse_args().steps
    samples = [
        {"prompt": question.format(country), "response": f"The capital of {country} is {capital}."}
        for question in QUESTIONS
        for country, capital in COUNTRIES.items()
    ]
    folder = Path(tempfile.mkdtemp(prefix="two-students-"))
    model, tokenizer = load_smollm2()
    students = {f"{layers} layers": cut(model, layers) for layers in (6, 10)}
    runs = [0]
    model.model.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    teacher = Teacher(model, folder / "teacher_cache")
    checks, table = runs[0], []
    for name, student in students.items():
        start, before = time.perf_counter(), runs[0]
        arguments = PoclConfig(
            str(folder / name.replace(" ", "-")),
            curriculum="none",  # all samples from the start: nothing is measured first
            steps_per_stage=steps,
            per_device_train_batch_size=6,
            learning_rate=5e-4,
            disable_tqdm=True,
        )
        PoclTrainer(student, teacher, arguments, samples, processing_class=tokenizer).train()
        table.append((name, time.perf_counter() - start, runs[0] - before))
    print(f"\n{'student':<12}{'seconds':>10}{'runs of the teacher':>24}")
    for name, seconds, count in table:
        print(f"{name:<12}{seconds:>10.1f}{count:>24}")
    print(f"\nthe cache in {teacher.cache.folder}: {teacher.cache.nbytes() / 2**20:.1f} MiB for {len(samples)} samples")
    print(f"(Teacher itself ran {checks} times, to see that packed batches give what single samples give)")


if __name__ == "__main__":
    main()
