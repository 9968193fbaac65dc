"""Nothing on the way of a loss waits for a GPU: shown without one, on tensors without values, of the "meta" device.

Whatever needs a value raises there, and a mode sees every operation that leaves the device. On a GPU,
reference/test_dense_triton.py shows the same by torch's own check and by a captured graph.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

N, V = 6, 4099


class Operations(TorchDispatchMode):
    """The names of all operations, and of those that tensors of two devices meet in."""

    def __init__(self):
        super().__init__()
        self.names, self.crossing = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.names.append(str(function))
        if len({x.device.type for x in tensors}) > 1:
            self.crossing.append(str(function))
        return result


@pytest.fixture
def operations():
    """New tensors have no values; what is done with them is noted."""
    with torch.device("meta"), Operations() as operations:
        yield operations


# what the tests below rely on
@pytest.mark.parametrize("wait", [torch.Tensor.item, bool, torch.Tensor.tolist, torch.Tensor.nonzero, torch.Tensor.cpu])
def test_a_wait_would_raise(operations, wait):
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        wait(torch.randn(()))


def test_a_copy_to_the_device_would_be_noticed(operations):
    torch.ones(3, device="cpu").to("meta")
    assert len(operations.crossing) == 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_loss_and_backward_do_not_wait(operations, divergence, dtype, reduction, inplace):
    hidden = torch.randn(N, 8, dtype=dtype, requires_grad=True)
    head, teacher = torch.randn(8, V, dtype=dtype), torch.randn(N, V, dtype=dtype)
    objective = Objective(divergence, temperature=torch.rand(N), alpha=torch.tensor(0.3))
    out = distillation_loss(
        hidden @ head,
        teacher,
        torch.zeros(N, dtype=torch.int64),
        objective,
        token_weights=torch.rand(N),
        num_items=torch.tensor(7),
        reduction=reduction,
        inplace=inplace,
        backend="triton",
    )
    (out.loss.sum() * 3).backward()
    name = "pocl_fast.distillation_rows_.default" if inplace else "pocl_fast.distillation_rows.default"
    assert {name, "pocl_fast.scale_rows.default"} <= set(operations.names)
    assert hidden.grad.device.type == "meta"
    assert {x.device.type for x in (out.loss, *out.metrics.values(), *out.per_token.values())} == {"meta"}
    assert not operations.crossing


def test_numbers_do_not_wait_either(operations):
    logits = torch.randn(N, V, requires_grad=True)
    objective = Objective("jsd", temperature=1.3, alpha=0.3)
    labels = torch.zeros(N, dtype=torch.int32)
    options = {"num_items": 7, "logit_softcap": 30.0, "backend": "triton"}
    distillation_loss(logits, torch.randn(N, V + 3), labels, objective, **options).loss.backward()
    assert not operations.crossing


# the operator's own side: what happens around the launch, of which the mode above sees only the operator's name
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_launchers_do_not_wait(operations, monkeypatch, needs_grad, reduced):
    pytest.importorskip("triton")
    from pocl_fast.kernels import dense

    launches = []

    class Launched:
        def __class_getitem__(cls, grid):
            return lambda *arguments, **options: launches.append(grid)

    monkeypatch.setattr(dense, "_rows_kernel", Launched)
    monkeypatch.setattr(dense, "_scale_rows_kernel", Launched)
    logits, values = torch.randn(N, V, dtype=torch.bfloat16), torch.rand(N)
    loss, stats, grad = dense.distillation_rows(
        logits,
        logits,
        Tokens(torch.zeros(N, dtype=torch.int64), values, values[:1], values),
        Settings("jsd", 0.5, 2, -100, [1.0, 0.0, 1.0, 0.0], "bucket"),
        needs_grad=needs_grad,
        reduced=reduced,
    )
    dense.scale_rows_(logits, values)
    assert launches == [(N,), (N, 2)]
    assert loss.shape == (() if reduced else (N,))
    assert stats.shape == (7, N)
    assert grad.shape == ((N, V) if needs_grad else (0,))
    assert not operations.crossing
