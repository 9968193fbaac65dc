"""Distils a model on a JSON Lines file of yours, and shows answers from before and after.

    python examples/distil_your_own_data.py [train.jsonl dev.jsonl] [any option of `pocl-fast distill`]

Without files it writes two small ones, so that you see the format. You will see the command that it runs, what that
command prints, the files that it leaves in runs/your-own-data, and three held-out prompts with the student's answers.
Run it again: it finds all steps done. The teacher is the bundled SmolLM2-135M, the student six of its 30 layers; your
own are `--teacher NAME --student NAME`. Two minutes on two cores. So few samples teach little: `make demo` has 448.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

OUTPUT = Path("runs/your-own-data")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def write_examples(folder: Path) -> tuple[Path, Path]:
    """Additions in words, each a sample in one of the formats; every fifth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(7) for b in range(6)]
    records = [
        {"prompt": f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", "response": [NUMBERS[a + b], str(a + b)]}
        for a, b in sums
    ]
    train, dev = folder / "train.jsonl", folder / "dev.jsonl"
    for path, chosen in ((train, [r for i, r in enumerate(records) if i % 5]), (dev, records[::5])):
        path.write_text("".join(json.dumps(record) + "\n" for record in chosen), encoding="utf-8")
    return train, dev


def main() -> None:
    words = sys.argv[1:]
    if words[:1] and not words[0].startswith("--"):
        train, dev, *words = words
    else:
        train, dev = map(str, write_examples(OUTPUT.with_name("your-own-data-files")))
    print(f"{train} begins with\n{Path(train).read_text(encoding='utf-8').splitlines()[0]}\n")
    command = [
        "pocl-fast", "distill", "--teacher", "bundled", "--student-layers", "6", "--train", train, "--dev", dev,
        "--output", str(OUTPUT), "--epochs-per-stage", "3", "--batch-size", "4", "--learning-rate", "5e-4",
        "--max-new-tokens", "16", *words,  # the last of two equal options wins
    ]  # fmt: skip
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "pocl_fast.cli", *command[1:]], check=True)

    print(f"\n{OUTPUT} holds {', '.join(sorted(path.name for path in OUTPUT.iterdir() if path.name[0] != '.'))}")
    tables = [pq.read_table(OUTPUT / "scores" / f"dev-{when}.parquet").to_pylist() for when in ("before", "after")]
    for before, after in list(zip(*tables, strict=True))[:3]:
        print(f"\n{before['prompt']}   (accepted: {', '.join(before['references'])})")
        print(f"  before: {before['answers'][0]!r}\n  after:  {after['answers'][0]!r}")


if __name__ == "__main__":
    main()
