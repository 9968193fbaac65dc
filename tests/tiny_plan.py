"""`pocl-fast plan` on a tiny run's inputs: what it prints."""

import json

from tiny_run import options

from pocl_fast.cli import main


def planned(capsys, *words):
    """The plan as JSON."""
    capsys.readouterr()
    assert main(["plan", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *words):
    capsys.readouterr()
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def by_tokens(inputs):
    return options(inputs, stages=2, epochs_per_stage=2, tokens_per_batch=170, eval_seeds=(10,))
