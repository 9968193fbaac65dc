"""Quantised models kept on disk: a second load gives the first one's model, and reads no full weights."""

import fcntl
import gc
import json
import logging
import threading
import time
import weakref

import pytest
import torch
from ranks import gloo
from tiny import save_tiny, tiny_model
from tiny_cache import samples
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, GraniteMoeConfig, LlamaConfig, MambaConfig, MixtralConfig

from pocl_fast.data.packed import pack
from pocl_fast.models import quantised
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.loading import load_model
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.models.quantised import load_quantised
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import teacher_fingerprint

pytest.importorskip("bitsandbytes")


@pytest.fixture
def source(tmp_path):
    return str(save_tiny(tmp_path / "model", hidden=64))  # bitsandbytes quantises blocks of 64


@pytest.fixture
def loads(monkeypatch):
    """What is loaded from now on, and how."""
    seen = []

    def load(source, **options):
        seen.append((source, options.get("quantization", "none")))
        return load_model(source, **options)

    monkeypatch.setattr(quantised, "load_model", load)
    return seen


def logits_of(model, many=None):
    ids = torch.tensor([[token for sample in many or samples() for token in sample.prompt_ids]])
    with torch.no_grad():
        return model(ids).logits


def kept(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_second_load_is_the_same_model_bit_for_bit_and_reads_no_full_weights(tmp_path, source, loads, quantization):
    said = []
    first = load_quantised(source, quantization, tmp_path / "kept", say=said.append)
    [folder] = kept(tmp_path / "kept")
    assert loads == [(source, quantization), (str(folder), "none")]
    loads.clear()
    second = load_quantised(source, quantization, tmp_path / "kept", say=said.append)
    assert loads == [(str(folder), "none")]
    assert weights_fingerprint(first) == weights_fingerprint(second)
    assert teacher_fingerprint(first) == teacher_fingerprint(second)
    assert torch.equal(logits_of(first), logits_of(second))
    assert torch.equal(logits_of(first), logits_of(load_model(source, quantization=quantization)))
    assert not second.training
    assert len(said) == 2
    assert all(f"s to load from {folder}" in line and "s from the full weights" in line for line in said)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_fidelity_that_is_said_is_that_of_the_two_models(tmp_path, source, quantization):
    said = []
    for _ in range(2):
        model = load_quantised(source, quantization, tmp_path / "kept", probe_samples=samples(), say=said.append)
    full = load_model(source)
    for one in (full, model):
        enable_packing(one)

    def log_probs(one):  # sample by sample: which activations 8-bit products leave out depends on the batch
        return torch.cat([supervised_logits(one, pack([s]), packed=True) for s in samples()]).double().log_softmax(-1)

    with torch.no_grad():
        p, q = log_probs(full), log_probs(model)
    kl = kl_div(q, p, log_target=True, reduction="batchmean").item()
    agreement = 100 * (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert 1e-6 < kl < 1
    record = json.loads((kept(tmp_path / "kept")[0] / "quantised.json").read_text())
    assert record["fidelity"]["kl"] == pytest.approx(kl, rel=1e-2)
    assert record["fidelity"]["agreement"] == pytest.approx(agreement / 100)
    told = f"the same first choice at {agreement:.1f} % of 33 tokens"
    assert all(f"KL {record['fidelity']['kl']:.2g} nats a token to the full model, {told}" in line for line in said)


def test_the_full_model_has_left_memory_when_the_quantised_one_is_loaded(tmp_path, source, monkeypatch):
    alive = []

    def load(source, **options):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        model = load_model(source, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(quantised, "load_model", load)
    load_quantised(source, "8bit", tmp_path / "kept", probe_samples=samples(), say=lambda _: None)
    assert len(alive) == 3  # the full one, the quantised one as it is made, and as it is read back


def test_no_more_logits_are_kept_than_so_many_tokens(tmp_path, source, monkeypatch):
    monkeypatch.setattr(quantised, "PROBE_TOKENS", 10)
    load_quantised(source, "8bit", tmp_path / "kept", probe_samples=samples(), say=lambda _: None)
    record = json.loads((kept(tmp_path / "kept")[0] / "quantised.json").read_text())
    assert record["fidelity"]["tokens"] == 10


def test_a_gguf_models_weights_are_read_once(tmp_path, loads, monkeypatch):
    monkeypatch.setattr("pocl_fast.models.loading.load_gguf", lambda folder, name, dtype: tiny_model(hidden=64))
    said = []
    model = load_quantised("bundled", "8bit", tmp_path / "kept", probe_samples=samples(), say=said.append)
    assert [how for _, how in loads] == ["none", "8bit", "none"]
    assert loads[0][0] == "bundled"
    assert loads[1][0] != "bundled"
    assert "KL" in said[0]
    want = load_model("bundled", quantization="8bit")
    assert torch.equal(logits_of(model), logits_of(want))


# A flipped bit in the weights, weights cut off, and a file that is gone.
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_one_is_named_and_made_again(tmp_path, source, loads, damage):
    want = logits_of(load_quantised(source, "4bit", tmp_path / "kept", say=lambda _: None))
    [folder] = kept(tmp_path / "kept")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.unlink()
    if damage != "gone":
        weights.write_bytes(data if damage == "flip" else data[:-100])
    said = []
    loads.clear()
    assert torch.equal(logits_of(load_quantised(source, "4bit", tmp_path / "kept", say=said.append)), want)
    assert f"the quantised model {folder} is made again: its model.safetensors " in said[0]
    assert loads[0] == (source, "4bit")
    load_quantised(source, "4bit", tmp_path / "kept", say=said.append)
    assert len(said) == 3


@pytest.mark.parametrize("change", ["weights", "quantization", "dtype", "library", "format"])
def test_what_was_made_otherwise_is_not_read(tmp_path, source, loads, monkeypatch, change):
    load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    if change == "weights":
        tiny_model(hidden=64, seed=1).save_pretrained(source)
    if change == "library":
        monkeypatch.setattr(quantised, "version", lambda name: "0.0")
    if change == "format":  # what an older version of the package has recorded
        [folder] = kept(tmp_path / "kept")
        record = json.loads((folder / "quantised.json").read_text())
        assert record["made_from"]["format"] == "2"
        monkeypatch.setattr(quantised, "_FORMAT", "3")
    loads.clear()
    quantization = "4bit" if change == "quantization" else "8bit"
    dtype = torch.bfloat16 if change == "dtype" else torch.float32
    model = load_quantised(source, quantization, tmp_path / "kept", dtype=dtype, say=lambda _: None)
    assert loads[0] == (source, quantization)
    assert len(kept(tmp_path / "kept")) == 2
    assert model.model.norm.weight.dtype == dtype


def test_a_process_killed_while_making_one_leaves_nothing_that_is_read(tmp_path, source, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantised, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    [half] = kept(tmp_path / "kept")
    assert half.name.endswith(".partial")
    (half / "leftover.safetensors").write_text("half")
    load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    [whole] = kept(tmp_path / "kept")
    assert not (whole / "leftover.safetensors").exists()


def test_a_process_waits_for_another_that_is_making_the_same(tmp_path, source, loads):
    load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    [folder] = kept(tmp_path / "kept")
    said = []
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = {"say": said.append}
        other = threading.Thread(
            target=load_quantised, args=(source, "8bit", tmp_path / "kept"), kwargs=options, daemon=True
        )
        other.start()
        while not said:
            time.sleep(0.01)
        assert said == [f"waiting for another process, which is making {folder}"]
        count = len(loads)
    other.join(timeout=60)
    assert len(said) == 2
    assert loads[count:] == [(str(folder), "none")]


def test_products_are_not_each_commented_on(tmp_path, source):
    """bitsandbytes says at every 8-bit product of fp32 inputs that they become fp16."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    log.setLevel(logging.NOTSET)
    load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    assert not log.isEnabledFor(logging.WARNING)
    log.setLevel(logging.NOTSET)
    load_quantised(source, "8bit", tmp_path / "kept", say=lambda _: None)
    assert not log.isEnabledFor(logging.WARNING)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot keep the quantised model in .*/file/8bit-.*: (Not a directory|File exists)"
    ):
        load_quantised(source, "8bit", tmp_path / "file")


def test_without_bitsandbytes_the_extra_to_install_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantization 4bit needs bitsandbytes: pip install"):
        load_quantised(source, "4bit", tmp_path / "kept")


def _of_a_rank(source, folder):
    said = []
    model = load_quantised(source, "8bit", folder, probe_samples=samples(), say=said.append)
    return ranks.rank(), len(said), weights_fingerprint(model)


@gloo
def test_one_rank_makes_it_and_all_have_it(two_ranks, tmp_path, source):
    (_, first, a), (_, second, b) = two_ranks(_of_a_rank, source, tmp_path / "kept")
    assert (first, second) == (1, 0)
    assert a == b
    assert len(kept(tmp_path / "kept")) == 1


def made_quantised(tmp_path, config, quantization, said):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return load_quantised(str(tmp_path / "model"), quantization, tmp_path / "kept", say=said.append)


EXPERTS = {"num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


# experts of a mixture are one tensor of three dimensions a layer, which is no linear layer
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("config", [MixtralConfig(**SIZES, **EXPERTS), GraniteMoeConfig(**SIZES, **EXPERTS)])
def test_how_little_of_a_mixture_of_experts_is_quantised_is_said(tmp_path, config, quantization):
    said = []
    model = made_quantised(tmp_path, config, quantization, said)
    of_layers = {name: p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim > 1}
    whole = sum(count for name, count in of_layers.items() if "experts" in name or "gate" in name or "router" in name)
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    share = round(100 * attention / (attention + whole))
    [line] = [line for line in said if "are quantised" in line]
    assert f"only {share} % of the layers' weights are quantised" in line
    assert "experts.gate_up_proj and " in line
    assert "stay in float32" in line


def test_a_model_of_linear_layers_has_no_such_line(tmp_path, source):
    said = []
    load_quantised(source, "8bit", tmp_path / "kept", say=said.append)
    assert not [line for line in said if "are quantised" in line]


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        (MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1), "8bit"),  # multiplies by weights itself
        (MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1), "4bit"),
        (LlamaConfig(**(SIZES | {"hidden_size": 32, "intermediate_size": 48}), num_attention_heads=4), "4bit"),
    ],
    ids=["mamba in 8 bits", "mamba in 4 bits", "rows of 32"],
)
def test_a_model_that_does_not_run_quantised_is_refused_and_not_kept(tmp_path, config, quantization):
    with pytest.raises(InputError, match=rf"does not run in {quantization}: .*\(teacher_quantization none\)"):
        made_quantised(tmp_path, config, quantization, [])
    assert not [folder for folder in kept(tmp_path / "kept") if not folder.name.endswith(".partial")]


def test_a_model_without_a_layer_to_quantise_is_refused(tmp_path, monkeypatch, source):
    from transformers import BitsAndBytesConfig

    every = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model", "lm_head"])
    monkeypatch.setattr("pocl_fast.models.loading._bitsandbytes", lambda *_: every)
    with pytest.raises(InputError, match="bitsandbytes finds no layer in LlamaForCausalLM that it quantises"):
        load_quantised(source, "8bit", tmp_path / "kept")
