"""Threads of the tokenizers library: within a batch, never in a forked process."""

import os
import subprocess
import sys

import pytest

CODE = """
import os
from pocl_fast.system import tokenizer_threads as threads
said = lambda: os.environ.get("TOKENIZERS_PARALLELISM")
threads.turn_off()
before = said()
with threads.on():
    within = said()
    reading, writing = os.pipe()
    if not os.fork():
        at_once = said()
        with threads.on():
            os.write(writing, f"{at_once} {said()}".encode())
        os._exit(0)
    os.wait()
print(before, within, said(), os.read(reading, 99).decode())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(
    ("given", "said"),
    [  # before, within a batch, after, in a process forked within one, and in a batch there
        (None, "false true false false false"),
        ("false", "false false false false false"),  # as the user has it
        ("true", "true true true true true"),
    ],
)
def test_threads_are_on_within_a_batch_and_off_in_forked_processes(given, said):
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {} if given is None else {"TOKENIZERS_PARALLELISM": given}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == said.split()
