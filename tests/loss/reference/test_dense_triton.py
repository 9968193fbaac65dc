"""The Triton kernel against the float64 reference with the tiles that it chooses itself, and what only a GPU can show.

What it shares with the C++ kernel: test_dense.py.
"""

import pytest
import torch
from compare import assert_matches, both, logits, some_labels
from test_dense import plain_options

from pocl_fast.loss.arguments import Tokens
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.row_operator import backend_module

pytestmark = pytest.mark.usefixtures("triton_device")


def but_two_in_full(*large):
    """Of each size the divergences; of the large ones all but a KL and a mixture are left to --full, for a pass over a
    row is the same code for all: two passes for a KL, three for the others."""
    sizes = [(divergence, *size) for size in large for divergence in DIVERGENCES]
    return [pytest.param(*s, marks=() if s[0] in ("forward_kl", "jsd") else pytest.mark.full) for s in sizes]


# a tile and one more logit; a real vocabulary, odd
@pytest.mark.parametrize(
    ("divergence", "N", "V", "dtype"),
    [
        *((divergence, 2, 4097, torch.float32) for divergence in DIVERGENCES),
        *but_two_in_full((1, 50257, torch.bfloat16)),
    ],
)
def test_a_real_vocabulary_matches(divergence, N, V, dtype):
    objective = Objective(divergence, temperature=1.33, alpha=0.3)
    assert_matches(logits(N, V, dtype=dtype), logits(N, V, dtype=dtype), some_labels(N, V), objective, backend="triton")


# of 128 logits a tile: fewer tiles than are ahead, of rows that cannot be copied so, and entries that only the student
# has; a ragged row, copied word by word; whole vectors, and more tiles than are ahead
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize(
    ("divergence", "stages", "V_s", "V_t", "dtype"),
    [
        *((divergence, 4, 173, 97, torch.float16) for divergence in DIVERGENCES),
        *but_two_in_full((2, 300, 300, torch.float32), (4, 768, 768, torch.bfloat16)),
    ],
)
def test_loops_that_the_compiler_pipelines_match(monkeypatch, divergence, stages, V_s, V_t, dtype):
    """And write their gradient over the student's logits, tiles of which are then being read ahead."""
    from pocl_fast.kernels import tiles

    monkeypatch.setattr(tiles, "choose_tile", lambda *_: tiles.Tile(32, 4, 1, stages))
    student, teacher, labels = logits(3, V_s, dtype=dtype), logits(3, V_t, dtype=dtype), some_labels(3, V_s)
    student[0, 5], labels[0] = -torch.inf, 6  # a row that the first pass reads twice
    assert_matches(student, teacher, labels, Objective(divergence, temperature=1.33, alpha=0.3), backend="triton")
    arguments = (teacher, Tokens(labels, torch.tensor([1.33]), torch.tensor([0.3]), torch.rand(3)))
    rows, options = backend_module("triton").distillation_rows, plain_options(divergence)
    _, _, grad = rows(student, *arguments, **options)
    _, _, over = rows(student, *arguments, **options, grad=student)
    assert torch.equal(over, grad)
    assert over.data_ptr() == student.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("V", [50257, 128256, 151936])
def test_a_whole_batch_matches_on_a_gpu(divergence, V):
    student, teacher = logits(64, V, dtype=torch.bfloat16), logits(64, V, dtype=torch.bfloat16)
    objective = Objective(divergence, temperature=1.33, alpha=0.3)
    assert_matches(student, teacher, some_labels(64, V), objective, backend="triton")


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_captured_graph_follows_a_changed_temperature():
    student, teacher = logits(8, 4096).requires_grad_(True), logits(8, 4096)
    labels, tau = some_labels(8, 4096), torch.tensor([1.0])
    objective = Objective("jsd", temperature=tau, alpha=0.3)

    def step():
        student.grad = None
        out = distillation_loss(student, teacher, labels, objective, backend="triton")
        out.loss.backward()
        return out.loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = student.grad
    for value in (1.0, 2.5):
        tau.fill_(value)
        graph.replay()
        again, gradient, _, _ = both(
            student, teacher, labels, Objective("jsd", temperature=value, alpha=0.3), backend="triton"
        )
        torch.testing.assert_close(loss, again.loss)
        torch.testing.assert_close(captured, gradient)


@pytest.mark.gpu
def test_torch_compile_takes_the_loss_without_a_graph_break():
    student, teacher, labels = logits(8, 4096), logits(8, 4096), some_labels(8, 4096)

    def loss(s):
        return distillation_loss(s, teacher, labels, Objective("jsd", alpha=0.3), backend="triton").loss

    plain, compiled = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)
