"""What a plan says of the models, with adapters and where one is missing, against those that a run has."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer, write_jsonl
from tiny_plan import planned, text
from tiny_run import options, read_json, refusal, run, scores_of
from transformers import AutoModelForCausalLM, GPT2Config

from pocl_fast.training.metrics import read_metrics


def test_parameters_are_those_of_the_models_as_they_are_loaded(inputs, kept, capsys):
    models = planned(capsys, *options(inputs))["models"]
    for name, folder in (("teacher", inputs / "teacher"), ("student", kept / "student")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert models[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert models[name]["layers"] == len(model.model.layers)
        assert models[name]["lm_head_parameters"] == model.lm_head.weight.numel()
    assert models["student"]["trained"] == models["student"]["parameters"]
    assert models["teacher"]["trained"] == 0


def test_a_prompt_of_a_conversation_that_the_model_has_no_positions_for_is_refused_as_distill_does(
    inputs, tmp_path, capsys
):
    """Of conversations whose answers are all trained on, the limit is on what is before the first one, and prompts that
    are answered are longer."""
    turns = [{"role": "user", "content": "7" * 20}, {"role": "assistant", "content": "3" * 20}]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns * count} for count in (1, 2, 3, 4, 5)])
    with torch.random.fork_rng():
        config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=258)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt")
    of_gpt = {"teacher": tmp_path / "gpt", "student_layers": 1, "train": tmp_path / "train.jsonl", "stages": 1}
    words = options(inputs, train_on="all", max_length=500, **of_gpt)
    few = planned(capsys, *words)
    assert few["data"]["train"]["lengths"]["prompts"]["quantiles"]["100"] < 250  # before the first answer
    several = [*words, "--max-new-tokens", "300"]
    said = refusal(capsys, "plan", tmp_path / "a", *several)
    assert "positions" in said
    assert said.replace("pocl-fast plan", "") == refusal(capsys, "distill", tmp_path / "b", *several).replace(
        "pocl-fast distill", ""
    )


@pytest.fixture(scope="module")
def adapted(inputs, tmp_path_factory):
    """A run with adapters on a cut student and one file of samples."""
    output = tmp_path_factory.mktemp("adapted") / "run"
    assert run("distill", output, *with_adapters(inputs)) == 0
    return output


def with_adapters(inputs, **changed):
    return options(inputs, dev=None, stages=1, eval_seeds=(10,), lora_rank=3, **changed)


def test_a_run_with_adapters_trains_and_saves_what_was_said(inputs, adapted, capsys):
    plan = planned(capsys, *with_adapters(inputs))
    files = {path.name: path.stat().st_size for path in (adapted / "student").rglob("*.safetensors")}
    saved = load_file(adapted / "student" / "adapter_model.safetensors")
    assert plan["models"]["student"]["trained"] == sum(one.numel() for one in saved.values())
    assert plan["disk"]["saved"] == "adapters, and the model they are for"
    assert files.keys() == {"adapter_model.safetensors", "model.safetensors"}
    student = sum(path.stat().st_size for path in (adapted / "student").rglob("*") if path.is_file())
    assert plan["disk"]["student"] <= student <= plan["disk"]["student"] + 15_000
    steps = {one["step"]: one["parts"] for one in plan["memory"]["steps"]}
    assert steps["train"]["optimizer's state"] == 8 * plan["models"]["student"]["trained"]


def test_adapters_merged_or_of_a_student_by_name_take_what_is_written(inputs, capsys):
    whole = planned(capsys, *options(inputs, dev=None, stages=1))["disk"]
    merged = planned(capsys, *with_adapters(inputs), "--merge-adapters")["disk"]
    assert (whole["saved"], merged["saved"]) == ("whole", "whole, adapters merged")
    assert merged["student"] == whole["student"]
    assert merged["checkpoint"] < whole["checkpoint"]
    named = planned(capsys, *with_adapters(inputs, student=inputs / "teacher", student_layers=None))
    trained = named["models"]["student"]["trained"]
    assert named["disk"]["saved"] == "adapters"
    assert merged["student"] > named["disk"]["student"] > 4 * trained


def test_held_out_samples_are_those_of_distill(inputs, adapted, capsys):
    plan = planned(capsys, *with_adapters(inputs))
    data, steps = plan["data"], plan["steps"]
    assert (data["train"]["records"], data["train"]["held_out"], data["train"]["samples"]) == (24, 2, 22)
    assert data["dev"]["samples"] == scores_of(adapted, "held-out")["after"]["samples"] == 2
    assert steps["exact"]
    assert steps["steps"] == max(record["step"] for record in read_metrics(adapted / "metrics.jsonl"))
    assert steps["stages"][0]["samples"] == len(read_json(adapted / "curriculum.json")["order"]) == 22
    assert steps["evaluations"] == 1
    shown = text(capsys, *with_adapters(inputs, held_out=1))
    assert (
        "  held out to evaluate with                    1\n  samples                                      23\n" in shown
    )
    assert "Data: dev, held out of " in shown


def test_adapters_train_as_many_weights_as_peft_makes(inputs, kept, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(kept / "student"),
        LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    words = options(inputs, lora_rank=3, lora_targets=("q_proj", "v_proj"))
    plan = planned(capsys, *words)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["models"]["student"]["trained"] == trained
    assert plan["models"]["student"]["parameters"] == model.get_base_model().num_parameters() - trained
    assert plan["disk"]["best_weights"] == 4 * 4 * trained  # fp32, of four evaluations


def test_adapters_are_described_and_refused_as_in_a_run(inputs, tmp_path, capsys):
    from peft import LoraConfig

    LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "older")
    by_folder = planned(capsys, *options(inputs, peft_config=tmp_path / "older"))["models"]["student"]
    by_words = planned(capsys, *options(inputs, lora_rank=3, lora_targets=("q_proj",)))["models"]["student"]
    assert by_folder["trained"] == by_words["trained"] > 0
    said = refusal(capsys, "plan", tmp_path / "out", *options(inputs, lora_rank=3, lora_targets=("q_prj",)))
    assert "has no layer q_prj (target_modules). Its linear layers are q_proj" in said


def test_parts_without_their_model_are_left_out_with_a_line(inputs, capsys):
    alone = planned(capsys, *options(inputs, teacher=None, student_layers=None, student=inputs / "teacher", dev=None))
    assert set(alone["models"]) == {"student"}
    assert alone["disk"]["cache"] is None
    said = " ".join(alone["notes"])
    assert "--teacher is missing" in said
    teacher = planned(capsys, *options(inputs, student_layers=None))
    assert set(teacher["models"]) == {"teacher"}
    assert teacher["memory"] is None
    assert teacher["disk"]["cache"] > 0
    assert "--student or --student-layers is missing" in " ".join(teacher["notes"])
