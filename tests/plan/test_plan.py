"""`pocl-fast plan`: what it says against what `distill` then does, and that it loads and writes nothing."""

import itertools
import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, read_json, refusal, run
from transformers import AutoModelForCausalLM, GPT2Config

from pocl_fast.cli import main
from pocl_fast.data.answer_choice import ENDS_EARLIER, STRIPPED, Note
from pocl_fast.data.control_text import KeptAsText
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.long_prompts import Shortenings
from pocl_fast.models import loading
from pocl_fast.plan.data_plan import NAMES, report_parts
from pocl_fast.run import train_step
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import read_metrics


def planned(capsys, *words):
    """The plan as JSON."""
    capsys.readouterr()
    assert main(["plan", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *words):
    capsys.readouterr()
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def kept(inputs, tmp_path_factory):
    """A run by tokens, in two stages of two passes, that keeps its checkpoints to the end."""
    output, words = tmp_path_factory.mktemp("kept") / "run", by_tokens(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "checkpoints", lambda _: [])  # which it deletes
        assert run("distill", output, *words) == 0
    return output


def by_tokens(inputs):
    return options(inputs, stages=2, epochs_per_stage=2, tokens_per_batch=170, eval_seeds=(10,))


def content(shard):
    """Bytes of a shard of the teacher's cache without its header and the end of its offsets."""
    with open(shard, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - 8 - header - 8


def all_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- what a run does ----


def test_steps_stages_and_the_cache_are_those_of_the_run(finished, capsys):
    inputs, output = finished
    plan = planned(capsys, *options(inputs))
    records = read_metrics(output / "metrics.jsonl")
    assert plan["steps"]["exact"]
    assert plan["steps"]["steps"] == max(record["step"] for record in records)
    stages = read_json(output / "curriculum.json")["stages"]
    assert [one["samples"] for one in plan["steps"]["stages"]] == [stage["size"] for stage in stages]
    for name in ("temperature", "alpha"):
        assert [one[name] for one in plan["steps"]["stages"]] == [stage[name] for stage in stages]
    assert plan["steps"]["evaluations"] == sum("eval_rouge_l" in record for record in records)
    shards = (output / "teacher_cache").rglob("shard-*.safetensors")
    assert plan["disk"]["cache"] == sum(map(content, shards))


def test_the_tokens_of_all_passes_are_those_that_were_trained_on(finished, capsys):
    """Of a run whose order is known; without it the stages' samples are taken to be of mean length."""
    inputs, output = finished
    known = planned(capsys, *options(inputs), "--output", output)
    trained = sum(record["tokens"] for record in read_metrics(output / "metrics.jsonl") if "tokens" in record)
    assert known["steps"]["tokens"] == trained
    assert planned(capsys, *options(inputs))["steps"]["tokens"] == pytest.approx(trained, rel=0.05)


def test_batches_by_tokens_are_an_estimate_until_the_order_is_known(inputs, kept, capsys):
    steps = max(record["step"] for record in read_metrics(kept / "metrics.jsonl"))
    before, after = planned(capsys, *by_tokens(inputs)), planned(capsys, "--output", kept)
    assert not before["steps"]["exact"]
    assert before["steps"]["steps"] == pytest.approx(steps, rel=0.1)
    assert after["steps"]["exact"]
    assert after["steps"]["steps"] == steps
    assert before["steps"]["largest_batch_tokens"] <= 170


def test_steps_that_do_not_depend_on_the_order_are_exact(inputs, capsys):
    assert planned(capsys, *by_tokens(inputs), "--curriculum", "none")["steps"]["exact"]
    plan = planned(capsys, *by_tokens(inputs), "--steps-per-stage", 3)["steps"]
    assert plan["exact"]
    assert plan["steps"] == 6
    assert planned(capsys, *by_tokens(inputs), "--set", "max_steps=5")["steps"]["steps"] == 5
    patient = planned(capsys, *options(inputs), "--patience", 1)["steps"]
    assert not patient["exact"]
    assert patient["note"].startswith("at most")


def test_checkpoints_best_weights_and_the_student_take_what_was_said(inputs, kept, capsys):
    """Beside headers of files and lists of numbers, which are a few kilobytes."""
    disk = planned(capsys, "--output", kept)["disk"]
    folder = kept / "checkpoints"
    found = checkpoints(folder)
    assert len(found) == disk["checkpoints"] - 1  # the one more is there while the next is written
    for one in found:
        bytes_ = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
        assert disk["checkpoint"] <= bytes_ <= disk["checkpoint"] + 60_000
    best = sum(path.stat().st_size for path in folder.glob("stage-*-best-*"))
    weights = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(kept / "student").parameters())
    assert disk["best_weights"] == 4 * weights  # both stages', and those that the two checkpoints know
    assert 2 * weights <= best <= disk["best_weights"] + 10_000
    student = sum(path.stat().st_size for path in (kept / "student").iterdir())
    assert disk["student"] <= student <= disk["student"] + 10_000


@pytest.mark.parametrize(
    ("changed", "bytes_a_token"),
    [
        ({"cache_dtype": "fp32"}, 32 * 4),
        ({"cache_dtype": "int8"}, 32 + 4),
        ({"cache_mode": "topk", "cache_top_k": 7}, 7 * 8),
    ],
)
def test_the_cache_is_counted_by_what_is_kept_of_a_token(inputs, capsys, changed, bytes_a_token):
    plan = planned(capsys, *options(inputs, **changed))
    supervised = plan["data"]["train"]["supervised_tokens"]
    assert plan["disk"]["cache"] == supervised * bytes_a_token + 24 * 32  # a key, a checksum, a place


# ---- data and models ----


def test_tokens_and_what_was_cut_are_those_of_the_tokenizer(inputs, tmp_path, capsys):
    tokenizer = loading.load_tokenizer(str(inputs / "teacher"))
    records = [{"prompt": "7" * n, "response": "3" * (2 * n)} for n in (1, 2, 3, 4, 5, 40, 200)]
    write_jsonl(tmp_path / "train.jsonl", records)
    words = options(inputs, train=tmp_path / "train.jsonl", long_prompts="skip", stages=1)
    data = planned(capsys, *words)["data"]["train"]

    def size(prompt, response=""):
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + response
        return len(tokenizer(text, add_special_tokens=False).input_ids) + bool(response)  # and the end of turn

    whole = [size(r["prompt"], r["response"]) for r in records]
    prompts = [size(r["prompt"]) for r in records]
    fit = [(n, p) for n, p in zip(whole, prompts, strict=True) if p <= 80]
    assert data["samples"] == len(fit) < data["records"] == 7
    assert data["tokens"] == sum(min(n, 96) for n, _ in fit)
    assert data["supervised_tokens"] == sum(min(n, 96) - p for n, p in fit)
    cut = [n - 96 for n, _ in fit if n > 96]
    lengths = data["lengths"]
    assert lengths["by_length_limit"] == {"samples": len(cut), "tokens": sum(cut)}
    gone = [n for n, p in zip(whole, prompts, strict=True) if p > 80]
    assert lengths["by_prompt_limit"] == {"samples": len(gone), "tokens": sum(gone)}
    assert (lengths["prompts"]["limit"], lengths["samples"]["limit"]) == (80, 96)
    assert len(cut) == len(gone) == 1
    assert data["report"] == {"skipped": 1, "truncated": 1}
    assert (lengths["prompts"]["quantiles"]["100"], lengths["samples"]["quantiles"]["100"]) == (
        max(prompts),
        max(whole),
    )
    assert data["answers"]["100"] == max(min(n, 96) - p for n, p in fit)


def test_parameters_are_those_of_the_models_as_they_are_loaded(inputs, kept, capsys):
    models = planned(capsys, *options(inputs))["models"]
    for name, folder in (("teacher", inputs / "teacher"), ("student", kept / "student")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert models[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert models[name]["layers"] == len(model.model.layers)
        assert models[name]["lm_head_parameters"] == model.lm_head.weight.numel()
    assert models["student"]["trained"] == models["student"]["parameters"]
    assert models["teacher"]["trained"] == 0


def test_what_is_left_out_and_what_a_limit_takes_is_counted_by_record(inputs, tmp_path, capsys):
    """A character is a token."""

    def said(*texts):
        roles = itertools.cycle(("user", "assistant"))
        return {"messages": [{"role": role, "content": content} for role, content in zip(roles, texts, strict=False)]}

    records = [
        said("1", "2"),
        said("1"),  # no answer
        said("<|end|>", "2"),  # a control token
        said("1", "2" * 200),  # cut
        said("7" * 40, "3", "7" * 40, "3"),  # the first exchange goes
        said("8" * 300, "2"),  # its beginning goes
    ]
    given = {"train": tmp_path / "train.jsonl", "bad_records": "skip", "long_prompts": "truncate-left", "stages": 1}
    given["train_on"] = "last"
    write_jsonl(given["train"], records)
    data = planned(capsys, *options(inputs, **given))["data"]["train"]
    assert (data["records"], data["samples"], data["held_out"]) == (6, 5, 0)
    report = data["report"]
    assert sum(report.pop("bad").values()) == 1
    assert report == {"shortened": 2, "turns_dropped": 2, "questions_cut": 1, "truncated": 1, "control": 1}
    words = options(inputs, **given | {"max_length": 511, "max_prompt_length": 510})
    whole = planned(capsys, *words)["data"]["train"]
    taken = [data["lengths"][name] for name in ("by_prompt_limit", "by_length_limit")]
    assert whole["tokens"] - data["tokens"] == sum(one["tokens"] for one in taken)
    assert [one["samples"] for one in taken] == [2, 1]
    shown = text(capsys, *options(inputs, **given))
    assert "  prompts shortened to the limit               2\n" in shown
    assert f"  lost to --max-prompt-length 80               {taken[0]['tokens']} tokens of 2\n" in shown


def test_every_part_of_a_report_has_a_name_and_is_counted():
    """So that a part that is added later is shown too."""
    report = LengthReport(
        9,
        skipped=(1, 2),
        truncated=(3,),
        unused=(("tools", 4),),
        unwritten=(("names", (5, 6)),),
        untrained=(7,),
        notes=(Note(STRIPPED, 3, (8,)), Note(ENDS_EARLIER, 5, (9, 10))),
        bad=(("not JSON", (11, 12)),),
        control=KeptAsText((13,), "<|end|>"),
        shortened=Shortenings((14, 15), turns=6, cut=1),
    )
    empty = LengthReport(9)
    known = {field.name for field in fields(LengthReport)} - {"samples", "unit", "before"}
    assert all(getattr(report, name) != getattr(empty, name) for name in known)
    parts = report_parts(report)
    assert parts.keys() == NAMES.keys()
    assert parts["notes"] == {
        "answers from which reasoning was taken out": 3,
        "conversations that end earlier for --max-length": 2,
        "answers left out so": 5,
    }
    assert parts["bad"] == {"not JSON": 2}
    assert parts["unwritten"] == {"names": 2}
    assert report_parts(empty) == {}


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


# ---- adapters, and a file of which samples are held out ----


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
    assert data["dev"]["samples"] == read_json(adapted / "evaluation.json")["after"]["samples"] == 2
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


# ---- nothing is loaded and nothing written ----


def no_model(*_, **__):
    raise AssertionError("a model was loaded")


def test_no_model_is_loaded_and_no_run_begun(inputs, tmp_path, capsys, monkeypatch):
    for name in ("load_model", "_load_gguf", "_load_merged"):
        monkeypatch.setattr(loading, name, no_model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)
    monkeypatch.chdir(tmp_path)
    planned(capsys, *options(inputs), "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_read_with_its_options_and_left_as_it_is(kept, capsys):
    before = all_files(kept)
    plan = planned(capsys, "--output", kept)
    assert plan["steps"]["stages"][0]["passes"] == 2
    assert all_files(kept) == before


def test_a_run_in_use_can_be_looked_at(kept, capsys):
    from pocl_fast.run.directory import RunDirectory

    before = (kept / "config.yaml").read_bytes()
    held = RunDirectory(kept)
    assert planned(capsys, "--output", kept)["steps"]["exact"]
    assert (kept / "config.yaml").read_bytes() == before
    held._lock.close()


def test_options_of_a_yaml_file_are_read_and_the_command_line_wins(inputs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    data = f"train: {inputs / 'train.jsonl'}\ndev: {inputs / 'dev.jsonl'}\n"
    file.write_text(f"{data}teacher: {inputs / 'teacher'}\nstages: 3\nbatch_size: 2\n")
    limits = ("--max-length", 96, "--max-prompt-length", 80)
    plan = planned(capsys, "--config", file, *limits, "--batch-size", 4, "--epochs-per-stage", 1)
    assert [one["samples"] for one in plan["steps"]["stages"]] == [8, 16, 24]
    assert [one["steps"] for one in plan["steps"]["stages"]] == [2, 4, 6]


# ---- what is missing, and what is wrong ----


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


def test_an_optimizer_whose_state_is_not_known_is_said_to_be_counted_as_adamw(inputs, capsys, monkeypatch):
    words, said = options(inputs), "keeps is not known before it runs, and counted as AdamW's"
    known = planned(capsys, *words)
    monkeypatch.setattr("pocl_fast.plan.plan.state_bytes_a_weight", lambda _: None)
    now = planned(capsys, *words)
    assert now["disk"]["checkpoint"] == known["disk"]["checkpoint"]
    assert any(said in note for note in now["notes"])
    assert not any(said in note for note in known["notes"])


def test_samples_are_held_out_of_the_file_as_distill_does(inputs, capsys):
    plan = planned(capsys, *options(inputs, dev=None))
    train, dev = plan["data"]["train"], plan["data"]["dev"]
    assert dev["samples"] == dev["records"] == train["held_out"] == 2
    assert train["records"] == train["samples"] + 2 == 24
    assert plan["steps"]["stages"][-1]["samples"] == 22
    assert sum(train["lengths"]["samples"]["counts"]) == 24  # of the file
    assert dev["lengths"] is None
    assert train["lengths"]["by_prompt_limit"]["tokens"] == 0
    said = text(capsys, *options(inputs, dev=None))
    assert "held out to evaluate with                    2\n" in said
    assert "missing" not in said


def test_what_is_counted_is_shown_as_a_number(inputs, tmp_path, capsys):
    lines = (inputs / "train.jsonl").read_text().splitlines()
    marked = {"instruction": "2+2?", "output": "4<|end|>"}
    write_jsonl(tmp_path / "marked.jsonl", [json.loads(line) for line in lines] + [marked])
    words = options(inputs, train=tmp_path / "marked.jsonl")
    assert planned(capsys, *words)["data"]["train"]["report"] == {"control": 1}
    assert "samples with control tokens kept as text     1\n" in text(capsys, *words)


# ---- how it looks ----


def test_the_table_fits_into_100_columns_and_has_every_part(inputs, capsys):
    lines = text(capsys, *options(inputs, train_on="last")).splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line.split(":")[0].split(",")[0] for line in lines if line and not line.startswith(" ")]
    assert heads == ["Data", "Data", "Steps", "Models", "Disk", "Memory"]


def test_a_disk_or_a_memory_that_is_too_small_is_a_warning(inputs, capsys, monkeypatch):
    assert "WARNING" not in text(capsys, *options(inputs))
    small = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    assert "WARNING: it does not fit on the disk" in text(capsys, *options(inputs))


def test_the_json_is_all_that_is_on_stdout_whatever_libraries_print(inputs, capsys, monkeypatch):
    from pocl_fast.plan import plan

    made = plan.make_plan

    def with_words(*given, **options):
        print("[WARNING] a library's line")
        return made(*given, **options)

    monkeypatch.setattr(plan, "make_plan", with_words)
    assert planned(capsys, *options(inputs))["steps"]["steps"] > 0


# ---- time ----


def test_times_are_of_every_step_and_what_was_trained_for_them_is_gone(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    times = planned(capsys, *options(inputs, signals="rouge_l,mean_kl"), "--time", "--output", tmp_path / "out")[
        "times"
    ]
    assert [one["step"] for one in times] == [
        "load and check the models",
        "measure",
        "measure the teacher",
        "evaluate before",
        "the teacher's cache",
        "train",
        "evaluate in training",
        "evaluate after",
    ]
    assert all(0 < one["seconds"] < 60 for one in times)
    assert list(tmp_path.iterdir()) == []
