"""Runs that train adapters: what they leave, what they resume from, and what of them meets an old result; and runs
whose only data is a training file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import arithmetic, tiny_tokenizer, write_jsonl
from tiny_options import reaches
from tiny_run import make_inputs, options, read_json, refusal, run, score_rows, scores_of, select
from tiny_training import before_each_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_fast.data.encoding import encoder_of
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.sample_set import SampleSet, split
from pocl_fast.options.run import RunData
from pocl_fast.records.samples import samples_from
from pocl_fast.run.steps import open_run
from pocl_fast.system.errors import InputError

peft = pytest.importorskip("peft")
IDS = torch.arange(9)[None]
LORA = {"stages": 2, "lora_rank": 2, "lora_targets": ("q_proj", "v_proj"), "learning_rate": 1e-2, "eval_seeds": 10}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained_logits(output):
    return logits(open_run(output, {}).context.trained_student().model)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("adapters"), train=12, dev=3)


@pytest.fixture(scope="module")
def adapted(inputs):
    """A distilled run with adapters on a cut student."""
    output = inputs / "adapted"
    assert run("distill", output, *options(inputs, **LORA), "--remeasure") == 0
    return output


def test_the_student_of_a_run_is_its_adapters_with_the_cut_model_and_the_tokenizer(inputs, adapted):
    student = adapted / "student"
    last = load_file(next((adapted / "checkpoints").glob("stage-2-best-*.safetensors")))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    assert len(last) == 8
    assert all(torch.equal(parameters[name], tensor) for name, tensor in last.items())
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(student / "base"))).abs().max() > 0.01
    torch.testing.assert_close(trained_logits(adapted), logits(model), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(student).chat_template
    assert (adapted / "checkpoints" / "stage-2" / "difficulty.parquet").is_file()  # measured again
    assert not list((adapted / "checkpoints").glob("checkpoint-*"))
    assert sorted(scores_of(adapted)) == ["after", "before", "teacher"]
    assert (adapted / "report.html").is_file()


def test_a_file_of_adapters_that_are_merged_leaves_the_same_student_whole(inputs, adapted, tmp_path, capsys):
    """The file says what the options say; its content counts, and not its place."""
    settings, output = tmp_path / "adapter_config.json", tmp_path / "out"
    saved = read_json(adapted / "student" / "adapter_config.json")
    settings.write_text(json.dumps(saved))
    others = {name: value for name, value in LORA.items() if not name.startswith("lora_")}

    def words(file):
        return *options(inputs, peft_config=file, **others), "--remeasure", "--merge-adapters"

    assert run("distill", output, *words(tmp_path)) == 0
    assert "train: the student is saved whole, its adapters merged into its weights, in " in capsys.readouterr().out
    whole = AutoModelForCausalLM.from_pretrained(output / "student", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), trained_logits(adapted), rtol=0, atol=1e-5)
    assert not (output / "student" / "adapter_config.json").exists()
    after = [scores_of(folder)["after"]["cross_entropy"] for folder in (adapted, output)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    settings.rename(tmp_path / "moved.json")
    assert run("distill", output, *words(tmp_path / "moved.json")) == 0
    (tmp_path / "moved.json").write_text(json.dumps(saved | {"r": 3}))
    said = refusal(capsys, "distill", output, *words(tmp_path / "moved.json"))
    assert "its step 'train' was made with other input (peft_config: was " in said


def test_adapters_of_a_student_by_name_name_it_and_are_saved_alone(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    words = options(inputs, student_layers=None, student="teacher", **(LORA | {"stages": 1}))
    assert run("distill", tmp_path / "out", *words) == 0
    student = tmp_path / "out" / "student"
    assert read_json(student / "adapter_config.json")["base_model_name_or_path"] == str(inputs / "teacher")
    assert not (student / "base").exists()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    torch.testing.assert_close(trained_logits(tmp_path / "out"), logits(model), rtol=0, atol=1e-5)


def test_a_run_with_adapters_that_is_killed_goes_on_to_the_same_bytes(inputs, adapted, tmp_path, monkeypatch):
    def power_cut(number, *_):
        if number == 4:  # in the second stage
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        before_each_batch(patch, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run("distill", tmp_path / "out", *options(inputs, **LORA), "--remeasure")
    assert list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert run("distill", tmp_path / "out", *options(inputs, **LORA), "--remeasure") == 0
    for name in ("adapter_model.safetensors", "base/model.safetensors"):
        assert (tmp_path / "out" / "student" / name).read_bytes() == (adapted / "student" / name).read_bytes()


@pytest.fixture
def copied(adapted, tmp_path):
    return shutil.copytree(adapted, tmp_path / "copy")


def test_adapters_belong_to_what_training_is_made_from(inputs, copied, capsys, tmp_path):
    said = refusal(capsys, "distill", copied, *options(inputs, **(LORA | {"lora_rank": 4})), "--remeasure")
    assert "its step 'train' was made with other input (lora_rank: was 2, now 4)" in said
    assert "merge_adapters: was False, now True" in refusal(
        capsys, "distill", copied, *options(inputs, **LORA), "--remeasure", "--merge-adapters"
    )
    changed = copied / "student" / "adapter_model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x01")
    said = refusal(capsys, "evaluate", copied, *select(options(inputs, **LORA), "evaluate"))
    assert "its step 'evaluate-after' was made with other input (student/adapter_model.safetensors: was " in said


def test_a_run_from_before_there_were_adapters_is_still_the_same_run(finished, tmp_path, capsys):
    inputs, output = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    words = options(inputs)
    stamps = read_json(output / "steps.json")
    new = {"lora_rank", "lora_alpha", "lora_targets", "peft_config", "merge_adapters", "held_out"}
    for stamp in stamps.values():
        stamp["made_from"] = {name: value for name, value in stamp["made_from"].items() if name not in new}
    (output / "steps.json").write_text(json.dumps(stamps))
    lines = (output / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if line.partition(":")[0] not in new and not line.startswith("- all-linear")]
    (output / "config.yaml").write_text("\n".join(kept))
    capsys.readouterr()
    assert run("distill", output, *words) == 0
    assert "train: already done, see " in capsys.readouterr().out
    said = refusal(capsys, "distill", output, *words, "--lora-rank", "2")
    assert "its step 'train' was made with other input (lora_rank: was None, now 2" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora-rank", "2", "--lora-targets", "c_attn"], "LlamaForCausalLM has no layer c_attn"),
        (["--lora-rank", "2", "--lora-targets", "norm"], "lora_rank does not fit LlamaForCausalLM: Target module"),
        (["--lora-alpha", "2"], "lora_alpha 2 is for LoRA adapters: give lora_rank too"),
        (["--merge-adapters"], "merge_adapters has no adapters to merge: give lora_rank or peft_config"),
        (["--lora-rank", "2", "--set", "fsdp=full_shard"], "a run trains adapters under DDP"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_before_a_model_runs(inputs, tmp_path, capsys, words, says):
    assert says in refusal(capsys, "distill", tmp_path / "out", *options(inputs), *words)
    assert not list((tmp_path / "out").glob("difficulty.parquet"))


def test_a_student_that_is_a_folder_of_adapters_is_merged_and_the_run_says_what_trains(
    inputs, adapted, tmp_path, capsys
):
    student = adapted / "student"
    words = options(inputs, student_layers=None, student=student, stages=1, eval_seeds=10)
    assert run("distill", tmp_path / "whole", *words) == 0
    assert f"train: the adapters {student} are merged, and all weights of the student train: give --lora-rank" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "whole" / "student" / "model.safetensors").is_file()
    assert run("distill", tmp_path / "new", *words, "--lora-rank", "2") == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "student" / "base", dtype=torch.float32)
    torch.testing.assert_close(logits(base), trained_logits(adapted), rtol=0, atol=1e-5)


# -- one file of data --------------------------------------------------------------------------------------------------


@reaches("held_out")
def test_samples_of_the_training_file_are_held_out(changed, inputs, tmp_path):
    given = {"teacher": str(inputs / "teacher"), "student_layers": 2, "train": str(inputs / "train.jsonl")}
    context = open_run(tmp_path, given | {"max_length": 96, "max_prompt_length": 80, "device": "cpu"} | changed).context
    train, dev = context.train_set, context.dev_set
    assert (len(train.encoded), len(dev.encoded)) == (11, 1)
    assert {one.index for one in train.encoded} | {one.index for one in dev.encoded} == set(range(12))


def test_distill_needs_no_more_than_one_file(inputs, tmp_path, capsys):
    words, output = options(inputs, dev=None, **(LORA | {"stages": 1})), tmp_path / "out"
    assert run("distill", output, *words) == 0
    assert "held out: 1 of 12 samples, which are not trained on" in capsys.readouterr().out
    scores = scores_of(output, "held-out")
    assert (scores["before"]["samples"], scores["after"]["samples"]) == (1, 1)
    held_out = score_rows(output, "after", "held-out")[0]["line"] - 1
    assert held_out not in read_json(output / "curriculum.json")["order"]
    assert run("evaluate", output) == 0  # as the run recorded it
    other = write_jsonl(tmp_path / "other.jsonl", arithmetic(12, start=1))
    said = refusal(capsys, "evaluate", output, "--train", str(other))
    assert "'evaluate-before' was made with other input (held-out data: was held out of " in said
    assert "--dev (or --held-out) is missing" in refusal(
        capsys, "evaluate", tmp_path / "new", *select(options(inputs, dev=None), "evaluate")
    )


def the_set(records):
    samples = samples_from(records, "tiny")
    encoder = encoder_of(tiny_tokenizer(), RunData(), None, lambda _: None)
    return SampleSet(
        samples, encode_all(samples, encoder, max_length=96, max_prompt_length=80, long_prompts="error", name="tiny")[0]
    )


# 5: fewer than ten still give one; 40 and 2: as many as asked; 40 and 100: a tenth
@pytest.mark.parametrize(("count", "most", "taken"), [(5, 100, 1), (40, 2, 2), (40, 100, 4)])
def test_at_most_a_tenth_is_held_out_whatever_the_order_of_the_file(count, most, taken):
    records, said = arithmetic(count), []
    train, dev = split(the_set(records), RunData(held_out=most), said.append)
    assert (len(dev.encoded), len(train.encoded)) == (taken, count - taken)
    assert said[0].startswith(f"held out: {taken} of {count} samples")
    _, again = split(the_set(records[::-1]), RunData(held_out=most), said.append)
    prompts = [{tuple(one.prompt_ids) for one in side.encoded} for side in (dev, again, train)]
    assert prompts[0] == prompts[1]
    assert not prompts[0] & prompts[2]


def test_no_prompt_is_both_trained_on_and_held_out():
    repeated = [{"prompt": f"Say {n % 4}", "response": str(n)} for n in range(40)]
    train, dev = split(the_set(repeated), RunData(held_out=100), lambda _: None)
    assert (len(train.encoded), len(dev.encoded)) == (30, 10)
    with pytest.raises(InputError, match="no samples can be held out where all have one prompt"):
        split(the_set([{"prompt": "Say", "response": str(n)} for n in range(9)]), RunData(held_out=1), print)


def test_a_file_of_held_out_samples_is_taken_whole(inputs):
    given = the_set(arithmetic(12))
    train, _ = split(given, RunData(dev="dev.jsonl", held_out=3), lambda _: None)
    assert train is given
