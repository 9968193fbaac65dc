"""Models in parts on devices, in main memory and on disk: they say what whole ones do, and so do teachers made of
them."""

import gc

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import parse
from tiny import save_tiny, tiny_model
from tiny_cache import samples
from tiny_teacher import ready

from pocl_fast.data.packed import pack
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.frozen import freeze_linears
from pocl_fast.models.lm_head import check_head, lm_head
from pocl_fast.models.loading import load_model
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.models.placement import Placement, input_device, resident
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import Teacher, teacher_fingerprint

HALF = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "lm_head": "cpu",
}  # fmt: skip
NEEDS_ACCELERATE = "accelerate before 1.15 refuses a model that is all on disk"
all_on_disk = pytest.mark.skipif(parse(accelerate.__version__) < parse("1.15"), reason=NEEDS_ACCELERATE)
ON_DISK = pytest.param("disk", marks=all_on_disk)
PLACES = {"half": HALF, "disk": {"": "disk"}, "memory": {"": "cpu"}, "auto": "auto"}


def placed(folder, name):
    """A tiny model whose parts lie so; "offload": all in main memory, brought to their device one by one."""
    source = str(save_tiny(folder / "model"))
    if name == "offload":
        return cpu_offload(load_model(source), execution_device=torch.device("cpu"))
    return load_model(source, placement=Placement(PLACES[name], offload_folder=folder / "parts"))


def on_meta(model):
    return sum(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "away"),
    [("half", 10), pytest.param("disk", 20, marks=all_on_disk), ("memory", 0), ("auto", 0), ("offload", 20)],
)
def test_a_model_in_parts_says_what_a_whole_one_says(tmp_path, name, away):
    model = placed(tmp_path, name)
    assert on_meta(model) in (away, away + 1)  # the tied weight of embedding and lm_head once or twice
    assert input_device(model) == torch.device("cpu")
    ids = torch.tensor([samples(3)[2].prompt_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)


@pytest.mark.parametrize("name", ["half", ON_DISK, "memory", "offload"])
def test_the_fingerprint_is_of_the_weights_wherever_they_lie(tmp_path, name):
    model = placed(tmp_path, name)
    assert weights_fingerprint(model) == weights_fingerprint(tiny_model())
    assert teacher_fingerprint(model) == teacher_fingerprint(tiny_model())


@pytest.mark.parametrize("name", ["half", ON_DISK, "offload"])
@pytest.mark.parametrize("mode", ["hidden", "topk"])
def test_a_teacher_in_parts_gives_a_loss_what_a_whole_one_gives(tmp_path, name, mode):
    options = {"cache_dtype": torch.float32, "cache_mode": mode, "top_k": 5}
    want = Teacher(ready(tiny_model()), tmp_path / "whole", **options).output(samples())
    model = placed(tmp_path, name)
    enable_packing(model)
    freeze_linears(model.get_decoder())
    teacher = Teacher(model, tmp_path / "parts", **options)
    before, live = teacher.output(samples()), teacher.live(samples())
    assert teacher.release_body_if_cached(samples())
    del model
    gc.collect()
    for got in (before, live, teacher.output(samples())):
        if mode == "topk":
            torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)
            assert torch.equal(got.indices, want.indices)
        else:
            torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-5, atol=1e-5)
            assert torch.equal(got.weight, want.weight)


def test_a_teacher_in_parts_is_distilled_from(tmp_path):
    model = placed(tmp_path, "half")
    enable_packing(model)
    teacher = Teacher(model, tmp_path / "parts", cache_dtype=torch.float32)
    batch = pack(samples())
    student = tiny_model(seed=3)
    hidden = torch.randn(len(batch.labels), 32, requires_grad=True)
    loss = linear_distillation_loss(
        hidden, lm_head(student).weight, teacher.output(samples()), batch.labels, Objective("forward_kl")
    ).loss
    loss.backward()
    logits = supervised_logits(ready(tiny_model()), batch, packed=True)
    p, q = logits.log_softmax(-1), (hidden @ lm_head(student).weight.T).log_softmax(-1)
    assert loss.item() == pytest.approx(((p.exp() * (p - q)).sum(-1)).mean().item(), rel=1e-3)
    assert hidden.grad.abs().sum() > 0


@all_on_disk
def test_packing_and_the_head_are_checked_in_parts_too(tmp_path):
    model = placed(tmp_path, "disk")
    enable_packing(model)
    check_head(model)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 2)
    with pytest.raises(InputError, match="more to its logits"):
        check_head(model)


def test_a_tensor_is_fetched_by_its_name_and_the_model_stays_as_it_was(tmp_path):
    model = placed(tmp_path, "half")
    before = on_meta(model)
    got = resident(model, "model.layers.1.mlp.up_proj.weight")
    assert torch.equal(got, tiny_model().model.layers[1].mlp.up_proj.weight)
    assert on_meta(model) == before


def test_what_a_loss_is_given_lies_on_the_device_asked_for(tmp_path):
    """The device "meta" stands in for a second one: things can be brought there, and nothing comes back."""
    teacher = Teacher(ready(tiny_model()), tmp_path, device="meta")
    output, live = teacher.output(samples()), teacher.live(samples())
    assert {t.device.type for out in (output, live) for t in (out.hidden, out.weight)} == {"meta"}
    assert teacher.release_body_if_cached(samples())
    assert teacher.output(samples()).hidden.device.type == "meta"
    top = Teacher(ready(tiny_model()), tmp_path, device="meta", cache_mode="topk", top_k=3)
    for out in (top.output(samples()), top.live(samples())):
        assert (out.log_probs.device.type, out.indices.device.type) == ("meta", "meta")
        assert out.indices.shape == (33, 3)


@pytest.mark.parametrize("spread", ["auto", "sequential", {"": "cpu"}])
def test_a_gguf_model_is_placed_once_it_is_read(spread, monkeypatch):
    monkeypatch.setattr("pocl_fast.models.loading.load_gguf", lambda folder, name, dtype: tiny_model())
    model = load_model("bundled", placement=Placement(spread, max_memory={"cpu": "1GiB"}))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)


def test_a_gguf_model_too_large_for_the_memory_given_goes_on_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("pocl_fast.models.loading.load_gguf", lambda folder, name, dtype: tiny_model(layers=4))
    most = {"cpu": 90_000}  # bytes: the embedding and some of the layers' 20 KB each
    model = load_model("bundled", placement=Placement("sequential", most, tmp_path / "parts"))
    assert 0 < on_meta(model) < len(list(model.parameters()))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(layers=4)(ids).logits)


def test_a_spread_that_accelerate_does_not_know_is_refused():
    with pytest.raises(InputError, match="device_map 'everywhere': must be one of auto, balanced, "):
        Placement("everywhere")
