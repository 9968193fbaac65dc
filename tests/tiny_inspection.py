"""`pocl-fast inspect` on a model without weights and three records."""

from tiny import save_tiny, write_jsonl

from pocl_fast.cli import main

RECORDS = [
    {"prompt": "Say <|end|>", "response": "yes 😀\nor no", "id": 7},
    {"prompt": "Say it", "response": "ok"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
]


def make_folder(made):
    """A model without weights, and records, in a folder."""
    save_tiny(made / "model")
    for weights in (made / "model").glob("*.safetensors"):
        weights.unlink()
    write_jsonl(made / "train.jsonl", RECORDS)
    return made


def inspect(folder, capsys, *words, status=0, train="train.jsonl"):
    """What the command prints; on stderr where it refuses."""
    capsys.readouterr()
    given = ["inspect", "--train", str(folder / train), "--model", str(folder / "model"), *map(str, words)]
    assert main(given) == status
    said = capsys.readouterr()
    return said.err if status else said.out
