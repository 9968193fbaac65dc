"""Adapters out of options: their configuration, what is refused, what is trained, and what is saved."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from tiny import save_tiny, tiny_model
from tiny_options import reaches, trainer_with_options
from tiny_training import curriculum_of, same_bits, trainer_of, weights_of
from transformers import AutoModelForCausalLM

from pocl_fast.cutting.cut import cut_layers
from pocl_fast.inputs.adapters import configuration_of, described, plain_state, with_adapters
from pocl_fast.inputs.saved_adapters import adapter_bytes, save_adapted, saved_bytes
from pocl_fast.loss.objective import Objective
from pocl_fast.models.loading import load_model, resolve
from pocl_fast.options.data import AdapterOptions
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig

peft = pytest.importorskip("peft")
IDS = torch.arange(9)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_peft(folder):
    """The logits of a saved student as peft itself loads it."""
    return logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def trained(folder, **options):
    """A trainer after a short training with these options; its student's logits are not those of the model without
    adapters."""
    student = tiny_model(layers=2, seed=0).float()
    before = logits(student)
    setting = {"learning_rate": 3e-2, "dev": False, "student": student}
    trainer = trainer_of(folder, curriculum=curriculum_of(8, stages=1), **(setting | options))
    trainer.train()
    assert (logits(trainer.model) - before).abs().max() > 0.01
    return trainer


def config_file(folder, **settings):
    folder.mkdir(exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(settings))
    return path


# -- the configuration -------------------------------------------------------------------------------------------------


@reaches("lora_rank", "lora_alpha", "lora_targets")
def test_lora_of_the_options_rank_scale_and_layers_is_trained(changed, tmp_path, capsys):
    model = trainer_with_options(tmp_path, changed, dev=False).model
    [config] = model.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 5)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "up_proj"}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    said = capsys.readouterr().out
    assert "student: LoRA rank 3, alpha 5 on q_proj (2), up_proj (2): 960 of 27,840 weights are trained" in said


@reaches("peft_config")
def test_any_adapters_of_peft_are_trained_by_their_file(changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path / "settings", peft_type="IA3", inference_mode=True, base_model_name_or_path="gone/model")
    model = trainer_with_options(tmp_path, changed, dev=False).model
    assert type(model.active_peft_config).__name__ == "IA3Config"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all("ia3_l" in name for name in trained)
    assert json.loads(PoclConfig(str(tmp_path / "o"), **changed).to_json_string())["peft_config"] == "settings"


@reaches("merge_adapters")
def test_a_trainer_saves_the_student_whole_where_adapters_are_merged(changed, tmp_path):
    trainer = trained(tmp_path / "out", lora_rank=4, **changed)
    want = logits(trainer.model)
    trainer.save_model(str(tmp_path / "student"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), want, rtol=0, atol=1e-5)
    assert not (tmp_path / "student" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(trainer.model), want, rtol=0, atol=0)  # which can go on


def test_without_a_scale_it_is_twice_the_rank_and_words_may_be_parted_by_commas():
    config = configuration_of(AdapterOptions(lora_rank=3, lora_targets=["q_proj,v_proj", "k_proj"]))
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj", "v_proj", "k_proj"})
    assert configuration_of(AdapterOptions(lora_rank=3)).target_modules == "all-linear"
    assert configuration_of(AdapterOptions()) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_alpha": 4.0}, "lora_alpha 4 is for LoRA adapters: give lora_rank too"),
        ({"lora_targets": ["q_proj"]}, "lora_targets q_proj is for LoRA adapters: give lora_rank too"),
        ({"lora_rank": 2, "lora_targets": ["all-linear", "lm_head"]}, "all-linear stands alone; leave out lm_head"),
        ({"lora_rank": 2, "lora_targets": []}, "lora_targets must have at least one value"),
        ({"lora_rank": 2, "peft_config": "c.json"}, "lora_rank and peft_config both describe the adapters"),
        ({"peft_config": "nowhere.json"}, "cannot read peft_config nowhere.json: No such file"),
    ],
)
def test_options_that_do_not_describe_adapters_are_refused_when_they_are_given(tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        PoclConfig(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no peft_type"),
        ('{"r": 8}', "has no peft_type"),
        ('{"peft_type": "LORRA"}', r"peft_type LORRA is none of peft .*did you mean.*LORA"),
        ('{"peft_type": "LORA", "rnk": 8, "lora_alfa": 1}', "does not know lora_alfa.*, rnk.* of LORA: take them out"),
        ('{"peft_type": "LORA", "task_type": "SEQ_CLS"}', "is for task_type SEQ_CLS: .* needs CAUSAL_LM"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}', "PrefixTuningConfig puts tokens before the prompt"),
        ('{"peft_type": "ADAPTION_PROMPT"}', "AdaptionPromptConfig puts tokens before the prompt"),
        ('{"peft_type": "ADALORA", "total_step": 9}', "AdaLoraConfig moves ranks between layers"),
        ('{"peft_type": "LORA", "alora_invocation_tokens": [1, 2]}', "alora_invocation_tokens look for their place"),
        ('{"peft_type": "LORA", "layers_pattern": "h"}', "is no LORA that peft .* takes: .*layers_to_transform"),
    ],
)
def test_a_file_that_is_no_configuration_for_a_student_is_refused_before_anything_is_loaded(tmp_path, text, says):
    path = config_file(tmp_path / "settings")
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        PoclConfig(str(tmp_path), peft_config=str(path))


def test_adapters_without_peft_say_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(InputError, match=r'lora_rank needs peft: pip install "pocl-fast\[peft\]"'):
        configuration_of(AdapterOptions(lora_rank=2))


def test_adapters_described_twice_or_to_be_merged_and_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"adapters are described twice, .* and by lora_rank of its arguments"):
        trainer_of(tmp_path / "a", count=4, lora_rank=2, peft_config=peft.LoraConfig(r=2))
    with pytest.raises(InputError, match="merge_adapters has no adapters to merge"):
        trainer_of(tmp_path / "b", count=4, merge_adapters=True)
    trainer_of(tmp_path / "c", count=4, merge_adapters=True, peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"lora_targets": ["q_proj", "c_attn"]},
            r"LlamaForCausalLM has no layer c_attn \(target_modules\). Its linear layers are q_proj \(2\), k_proj \(2\)"
            r".*lm_head \(1\); all-linear is all of these but the lm_head",
        ),
        ({"lora_targets": ["mlp"]}, "lora_rank does not fit LlamaForCausalLM: Target module LlamaMLP"),
    ],
)
def test_layers_that_are_not_there_are_named_with_those_that_are(options, says):
    model = tiny_model().float()
    with pytest.raises(InputError, match=says):
        with_adapters(model, configuration_of(AdapterOptions(lora_rank=2, **options)), "lora_rank")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_lora_weights": "pissa"}, "begin by changing the model's own weights"),
        ({"init_lora_weights": "olora"}, "begin by changing the model's own weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "add layers to the model"),
    ],
)
def test_adapters_that_could_not_be_loaded_on_their_model_again_are_refused(settings, says):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    with pytest.raises(InputError, match=says):
        with_adapters(tiny_model().float(), config, "peft_config")


def test_adapters_that_cannot_be_merged_are_refused_where_they_are_to_be(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    with_adapters(tiny_model().float(), config, "peft_config")
    with pytest.raises(InputError, match=r"merge_adapters: adapters of the kind peft\.tuners\.lora.* cannot be merged"):
        with_adapters(tiny_model().float(), config, "peft_config", merges=True)


def test_the_seed_draws_the_adapters_and_no_other_random_number_moves():
    config = configuration_of(AdapterOptions(lora_rank=2))
    models = [tiny_model().float() for _ in range(3)]
    before = torch.get_rng_state()
    one, again, other = (
        weights_of(with_adapters(m, config, "", seed=s)) for m, s in zip(models, (1, 1, 2), strict=True)
    )
    assert same_bits(one, again)
    assert not same_bits(one, other)
    assert torch.equal(torch.get_rng_state(), before)


# -- trained -----------------------------------------------------------------------------------------------------------


def test_the_gradient_of_adapters_is_that_of_torch(tmp_path):
    """Against transformers' eager attention, each sample alone, in float64."""
    options = {"lora_rank": 2, "lora_targets": ["q_proj", "down_proj", "embed_tokens"]}
    trainer = trainer_of(tmp_path, curriculum=curriculum_of(4, stages=1, temperatures=[1.0], alphas=[1.0]), **options)
    model = trainer.model
    with torch.no_grad():
        for name, p in model.named_parameters():  # B begins at zero, and A then has no gradient
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    trainer.objective = Objective(alpha=1.0)
    batch = trainer.get_train_dataloader().dataset[0, 0]
    trainer.compute_loss(model, batch).backward()
    got = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    exact.set_attn_implementation("eager")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in batch.samples:
        out = exact(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
        answer = out[len(sample.prompt_ids) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(answer, torch.tensor(sample.response_ids), reduction="sum")
        count += len(sample.response_ids)
    (total / count).backward()
    want = {name: p.grad for name, p in exact.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    assert len(got) == 10
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


# -- saved -------------------------------------------------------------------------------------------------------------

KINDS = {
    "LoRA on all": {"peft_type": "LORA", "target_modules": "all-linear", "r": 2},
    "a tied embedding": {"peft_type": "LORA", "target_modules": ["embed_tokens", "q_proj"], "r": 2},
    "a tied lm_head": {"peft_type": "LORA", "target_modules": ["lm_head"], "r": 2},
    "lm_head whole": {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2},
    "DoRA": {"peft_type": "LORA", "target_modules": ["q_proj", "up_proj"], "use_dora": True, "r": 2},
    "IA3": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_student_is_the_trained_one_by_peft_by_us_and_merged(tmp_path, kind):
    trainer = trained(tmp_path / "out", peft_config=config_file(tmp_path / "settings", **KINDS[kind]))
    want = logits(trainer.model)
    trainer.save_model(str(tmp_path / "student"))
    torch.testing.assert_close(by_peft(tmp_path / "student"), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "student"))), want, rtol=0, atol=1e-5)
    trainer.args.merge_adapters = True
    trainer.save_model(str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), want, rtol=0, atol=1e-5)
    for one in (plain, load_model(str(tmp_path / "student"))):
        is_tied = one.get_input_embeddings().weight is one.get_output_embeddings().weight
        assert is_tied == ("tied" not in kind and "lm_head" not in kind)  # where adapters made no difference


def test_adapters_of_a_model_that_has_a_name_are_saved_alone_and_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    model = with_adapters(load_model("model"), configuration_of(AdapterOptions(lora_rank=2)), "lora_rank")
    assert save_adapted(model, tmp_path / "student") == f"as adapters for {tmp_path / 'model'}"
    assert not (tmp_path / "student" / "base").exists()
    monkeypatch.chdir("/")  # the name holds from everywhere
    torch.testing.assert_close(by_peft(tmp_path / "student"), logits(model), rtol=0, atol=1e-5)


def test_a_cut_model_is_saved_beside_its_adapters_and_both_may_be_moved(tmp_path):
    cut = cut_layers(load_model(str(save_tiny(tmp_path / "model", layers=4))), 2)
    before = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
    model = with_adapters(cut, configuration_of(AdapterOptions(lora_rank=2)), "lora_rank")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    want = logits(model)
    said = save_adapted(model, tmp_path / "partial", place=tmp_path / "student")
    assert said == "as adapters, with the model that they are for beside them in base"
    (tmp_path / "partial").rename(tmp_path / "student")
    torch.testing.assert_close(by_peft(tmp_path / "student"), want, rtol=0, atol=1e-5)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "base_model" not in card  # neither the model that was cut nor an empty name
    assert "library_name: peft" in card
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "base", dtype=torch.float32).state_dict()
    assert same_bits(base, before)
    (tmp_path / "student").rename(tmp_path / "moved")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "moved"))), want, rtol=0, atol=1e-5)
    save_tiny(tmp_path / "student" / "base", layers=2, seed=5)  # a later run's, where the first one was
    torch.testing.assert_close(logits(load_model(str(tmp_path / "moved"))), want, rtol=0, atol=1e-5)


def test_the_models_own_weights_have_their_names_under_any_adapters():
    model = tiny_model(tied=False).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = with_adapters(model, config, "peft_config")
    assert same_bits(plain_state(adapted.get_base_model()), before)
    assert described(adapted) == (
        "LoRA rank 2, alpha 8 on q_proj (2), and the whole of lm_head (1): 8,544 of 43,712 weights are trained"
    )


def test_adapters_of_the_hub_that_are_on_this_machine_are_found_by_their_id(tmp_path, monkeypatch):
    model = with_adapters(
        load_model(str(save_tiny(tmp_path / "model"))), configuration_of(AdapterOptions(lora_rank=2)), "lora_rank"
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    snapshot = tmp_path / "hub" / "models--me--adapters" / "snapshots" / ("a" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve("me/adapters").adapter == str(snapshot)
    torch.testing.assert_close(logits(load_model("me/adapters")), logits(model), rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path / "hub")
    assert resolve("me/adapters").adapter is None


# -- without weights ---------------------------------------------------------------------------------------------------

LORA_KIND = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "settings",
    [
        LORA_KIND | {"target_modules": "all-linear"},
        LORA_KIND | {"use_dora": True},
        LORA_KIND | {"modules_to_save": ["lm_head"]},
        LORA_KIND | {"trainable_token_indices": [1, 2]},
        {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "OSF", "target_modules": ["q_proj"]},
    ],
    ids=lambda settings: " ".join([settings["peft_type"], *list(settings)[3:]]),
)
def test_adapters_of_a_model_without_weights_have_the_sizes_of_real_ones(settings, tmp_path):
    config = configuration_of(AdapterOptions(peft_config=config_file(tmp_path / "c", **settings)))
    model = tiny_model().float()
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.name_or_path = model.name_or_path = ""
    real, empty = (with_adapters(one, copy.deepcopy(config), "peft_config") for one in (model, empty))
    sizes, others = (
        {name: tuple(p.shape) for name, p in one.named_parameters() if p.requires_grad} for one in (real, empty)
    )
    assert sizes == others
    assert all(p.is_meta for p in empty.parameters())
    save_adapted(real, tmp_path / "out")
    alone = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    base = (tmp_path / "out" / "base" / "model.safetensors").stat().st_size
    header = 20_000
    assert adapter_bytes(empty) < alone < adapter_bytes(empty) + header
    assert saved_bytes(empty) < alone + base < saved_bytes(empty) + header
    assert saved_bytes(empty, whole=True) < base < saved_bytes(empty, whole=True) + header
