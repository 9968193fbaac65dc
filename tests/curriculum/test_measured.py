"""The difficulty that a trainer measures itself: when, by which options, and against the teacher's cache."""

import contextlib
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_tokenizer
from tiny_run import options, run
from tiny_training import (
    before_each_batch,
    curriculum_of,
    encoded_samples,
    same_bits,
    student_model,
    teacher_model,
    train,
    trainer_of,
    weights_of,
)

from pocl_fast.answers import vllm
from pocl_fast.answers.decoding import generate
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.answers.likelihood import LoadedModel, response_scores
from pocl_fast.curriculum import measurer
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.system.errors import InputError, Interrupted
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

TWO_STAGES = {"curriculum": curriculum_of(8, stages=2), "learning_rate": 5e-2, "remeasure": True}


def answers_in(folder):
    return pq.read_table(folder / "difficulty.parquet")["answer"].to_pylist()


# -- when --------------------------------------------------------------------------------------------------------------


def test_difficulty_is_measured_by_the_student_before_training_and_once(tmp_path):
    student = student_model()
    curriculum = trainer_of(tmp_path, count=8, student=student).planned().curriculum
    assert sorted(curriculum.order.tolist()) == list(range(8))
    assert [stage.size for stage in curriculum.stages] == [2, 4, 6, 8]
    assert (tmp_path / "difficulty.parquet").is_file()
    saved = Curriculum.load(tmp_path / "curriculum.json")
    assert saved.order.tolist() == curriculum.order.tolist()
    (tmp_path / "difficulty.parquet").unlink()
    assert trainer_of(tmp_path, count=8, student=student).planned().curriculum.order.tolist() == saved.order.tolist()
    for other in (
        {"count": 12, "student": student},
        {"count": 8, "student": student_model(seed=5)},
        {"count": 8, "student": student, "measure_temperature": 1.0},
        {"count": 8, "student": student, "stages": 3},
    ):
        with pytest.raises(InputError, match="the difficulty of other samples, of another student or teacher"):
            trainer_of(tmp_path, **other).planned()


def test_a_difficulty_that_a_teacher_was_read_for_is_not_taken_for_another_teacher(tmp_path):
    def planned(signals, seed):
        teacher = Teacher(teacher_model(seed), tmp_path / f"teacher-{seed}", cache_dtype=torch.float32)
        trainer = trainer_of(tmp_path / signals, count=8, student=student_model(), teacher=teacher, signals=signals)
        return trainer.planned()

    planned("mean_kl", 1)
    planned("mean_kl", 1)
    with pytest.raises(InputError, match="of another student or teacher"):
        planned("mean_kl", 2)
    planned("cross_entropy", 1)
    planned("cross_entropy", 2)  # which does not read it


def test_the_difficulty_is_measured_again_before_each_stage_where_asked(tmp_path, capsys):
    trainer = trainer_of(tmp_path, **TWO_STAGES)
    trainer.train()
    again = Curriculum.load(tmp_path / "stage-2" / "curriculum.json")
    assert trainer.planned().subset(1).tolist() == again.order.tolist() != list(range(8))
    assert trainer.planned().subset(0).tolist() == [0, 1, 2, 3]
    assert "difficulty: 8 samples measured, means rouge_l " in capsys.readouterr().out


def test_without_a_curriculum_an_earlier_one_in_the_folder_is_not_taken(tmp_path):
    trainer_of(tmp_path, count=12, stages=3).planned()
    assert (tmp_path / "curriculum.json").exists()
    assert len(trainer_of(tmp_path, count=12, stages=3, kind="none").planned().stages) == 1


# -- by which options --------------------------------------------------------------------------------------------------


def sampled(student, encoded, encoder, seed):
    """The student's answers to the samples at temperature 1."""
    answers = generate(
        student,
        [one.prompt_ids for one in encoded],
        max_new_tokens=2,
        end_ids=encoder.end_ids,
        pad_id=256,
        temperature=1.0,
        seed=seed,
        sample_ids=[one.index for one in encoded],
    )
    return [text.strip() for text in encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def test_where_rouge_is_blind_is_said_of_the_first_measurement_alone(tmp_path, capsys):
    trainer = PoclTrainer(
        student_model(),
        Teacher(teacher_model(), tmp_path / "teacher_cache"),
        PoclConfig(
            output_dir=str(tmp_path), stages=2, remeasure=True, epochs_per_stage=1, max_new_tokens=2, use_cpu=True
        ),
        [{"prompt": f"问题 {n}", "response": "答案"} for n in range(4)],
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert (tmp_path / "stage-2" / "difficulty.parquet").is_file()
    assert capsys.readouterr().out.count("train_dataset: ROUGE-L is blind for 4 of 4 references") == 1


def test_a_signal_that_tells_little_is_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat_measure.py").write_text("def score(record):\n    return 3\n")
    trainer_of(tmp_path / "out", count=8, stages=2, signals="flat_measure:score,cross_entropy").planned()
    said = capsys.readouterr().out
    assert "difficulty: flat_measure:score: all 8 samples have one score, 3, so it does not tell which" in said


@pytest.mark.parametrize("ties", ["average", "first"])
def test_equal_scores_rank_as_the_options_say(tmp_path, monkeypatch, ties):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tied_measure.py").write_text("def score(record):\n    return int(record['index'] == 7)\n")
    signals = {"signals": "tied_measure:score,cross_entropy", "ties": ties}
    made = trainer_of(tmp_path / "out", count=8, stages=2, **signals).planned().curriculum
    loss = pq.read_table(tmp_path / "out" / "difficulty.parquet")["cross_entropy"].to_numpy()
    by_loss = np.argsort(np.argsort(loss)) + 1
    by_own = np.append(np.full(7, 4.0) if ties == "average" else np.arange(1.0, 8.0), 8.0)
    np.testing.assert_allclose(made.score, (1 / (60 + by_own) + 1 / (60 + by_loss))[made.order], rtol=1e-15)
    with pytest.raises(InputError, match="by other options"):
        trainer_of(
            tmp_path / "out", count=8, stages=2, **(signals | {"ties": "first" if ties == "average" else "average"})
        ).planned()


def test_answers_are_sampled_with_the_temperature_and_seed_of_the_options(tmp_path):
    sampling = {"measure_temperature": 1.0, "measure_seed": 3}
    first = trainer_of(tmp_path / "first", count=8, stages=2, remeasure=True, **sampling)
    first.planned()
    encoded, encoder = first.samples.encoded, first.encoder
    assert answers_in(tmp_path / "first") == sampled(student_model(), encoded, encoder, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        before_each_batch(patch, lambda n, trainer, _: seen.update({n: weights_of(trainer.model)}))
        trainer_of(tmp_path / "again", **TWO_STAGES, **sampling).train()
    student = student_model()
    student.load_state_dict(seen[2], strict=False)  # as the second stage began
    again = answers_in(tmp_path / "again" / "stage-2")
    assert again == sampled(student, encoded, encoder, seed=3)
    assert again != sampled(student, encoded, encoder, seed=0)


class Engine:
    """Answers every prompt with the same token."""

    def __init__(self):
        self.asked = []

    def batches(self, prompts, max_new_tokens):
        return [list(range(len(prompts)))]

    def generate(self, prompts, **how):
        self.asked.append((len(prompts), how["temperature"], how["seed"]))
        return [[55] for _ in prompts]


def with_engine(monkeypatch):
    """vLLM is there, as on a GPU; what is asked of it."""
    engine, loads = Engine(), []

    @contextlib.contextmanager
    def loaded(model, **how):
        loads.append(how)
        yield engine

    monkeypatch.setattr(vllm, "chosen", lambda name, device: name != "torch")
    monkeypatch.setattr(vllm, "loaded", loaded)
    return engine.asked, loads


def test_the_engine_of_the_options_answers(tmp_path, monkeypatch):
    asked, loads = with_engine(monkeypatch)
    trainer_of(tmp_path / "torch", count=8, generation_engine="torch").planned()
    assert asked == []
    setting = {"generation_engine": "vllm", "measure_temperature": 0.5, "measure_seed": 9}
    trainer_of(tmp_path / "vllm", **TWO_STAGES, **setting).train()
    assert asked == [(8, 0.5, 9)]
    assert loads == [{"max_length": 80 + 2, "dtype": "float32", "forbidden_ids": []}]
    assert answers_in(tmp_path / "vllm" / "stage-2") == [tiny_tokenizer().decode([55])] * 8


def test_an_engine_that_cannot_answer_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="generation_engine vllm"):
        trainer_of(tmp_path, count=8, generation_engine="vllm")
    trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), generation_engine="vllm")  # it is not asked there


def test_a_student_with_adapters_is_answered_for_by_torch(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    asked, _ = with_engine(monkeypatch)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer_of(tmp_path, count=8, peft_config=config).planned()
    assert asked == []
    with pytest.raises(InputError, match="generation_engine=vllm does not load a student with adapters"):
        trainer_of(tmp_path, count=8, peft_config=config, generation_engine="vllm")


def test_distill_measures_again_by_the_options_of_its_command_line(finished, tmp_path, monkeypatch):
    inputs, _ = finished
    seen, measure = [], measurer.measure

    def watched(*args, **how):
        seen.append((how["temperature"], how["seed"], type(how["engine"])))
        return measure(*args, **how)

    monkeypatch.setattr(measurer, "measure", watched)  # the run's own measurement has its name already
    sampling = {"measure_temperature": 0.7, "measure_seed": 5, "generation_engine": "torch"}
    signals = {"signals": "teacher_cross_entropy,cross_entropy_gap,mean_kl", "stages": 2}
    words = [*options(inputs, **sampling, **signals), "--remeasure"]
    assert run("distill", tmp_path / "out", *words) == 0
    assert seen == [(0.7, 5, TorchEngine)]
    stage = tmp_path / "out" / "checkpoints" / "stage-2"
    first = pq.read_table(tmp_path / "out" / "teacher_scores.parquet")
    again = pq.read_table(stage / "teacher_scores.parquet")
    # the same teacher, whose hidden states the cache rounds to bf16; another student
    np.testing.assert_allclose(again["teacher_cross_entropy"], first["teacher_cross_entropy"], rtol=5e-3)
    assert not np.allclose(again["mean_kl"], first["mean_kl"], rtol=5e-3)


# -- against the teacher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", ["teacher_cross_entropy", "cross_entropy_gap,rouge_l", "mean_kl"])
@pytest.mark.parametrize("released", [False, True], ids=["layers", "cache-alone"])
def test_signals_of_the_teacher_are_measured_again_whether_its_layers_are_there_or_not(tmp_path, signals, released):
    teacher = Teacher(teacher_model(), tmp_path / "cache", cache_dtype=torch.float32)
    _, encoded = encoded_samples(8)
    if released:  # at the end of the first pass
        teacher.fill(encoded)
        assert teacher.release_body_if_cached(encoded)
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        before_each_batch(patch, lambda n, trainer, _: seen.update({n: weights_of(trainer.model)}))
        trainer_of(tmp_path / "run", **TWO_STAGES, signals=signals, teacher=teacher).train()
    student = student_model()
    student.load_state_dict(seen[2], strict=False)  # as the second stage began
    want = response_scores(LoadedModel(student, True), encoded, LoadedModel(teacher_model(), True))
    found = pq.read_table(tmp_path / "run" / "stage-2" / "teacher_scores.parquet")
    for name in ("teacher_cross_entropy", "mean_kl"):
        np.testing.assert_allclose(found[name].to_numpy(), want[name], rtol=1e-4)
    if signals == "mean_kl":
        order = Curriculum.load(tmp_path / "run" / "stage-2" / "curriculum.json").order
        assert order.tolist() == np.argsort(want["mean_kl"], kind="stable").tolist()


def test_a_trainer_measures_signals_of_the_teacher_before_training_too(tmp_path):
    model, runs = teacher_model(), []
    teacher = Teacher(model, tmp_path / "cache", cache_dtype=torch.float32)
    trainer = trainer_of(tmp_path, count=8, stages=2, signals="mean_kl", teacher=teacher)
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: runs.extend(kwargs["packed_lengths"]), with_kwargs=True
    )
    trainer.planned()
    want = response_scores(LoadedModel(student_model(), True), trainer.samples.encoded, LoadedModel(model, True))
    runs_to_measure, order = len(runs) - 8, trainer.planned().curriculum.order  # 8 of them are of `want`
    assert order.tolist() == np.argsort(want["mean_kl"], kind="stable").tolist()
    assert runs_to_measure == 8
    trainer.train()
    assert len(runs) == 16  # the cache holds what training needs


def test_a_run_measured_again_against_the_teacher_resumes_to_the_same_bits(tmp_path):
    setting = {**TWO_STAGES, "signals": "mean_kl,rouge_l", "epochs_per_stage": 2}
    whole = train(tmp_path / "whole", **setting)
    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, lambda number, *_: os.kill(os.getpid(), signal.SIGINT) if number == 4 else None)
        with pytest.raises(Interrupted):
            train(tmp_path / "cut", **setting)
    assert same_bits(weights_of(train(tmp_path / "cut", **setting)), weights_of(whole))


def test_a_cache_of_the_most_likely_tokens_is_refused_where_the_teacher_is_measured_from_it(tmp_path):
    reads = {"signals": "mean_kl,rouge_l", "cache_mode": "topk", "teacher": teacher_model()}
    with pytest.raises(InputError, match="measures mean_kl from the teacher's cache, and cache_mode=topk keeps only"):
        trainer_of(tmp_path, **TWO_STAGES, **reads)
    with pytest.raises(InputError, match="cache_mode=topk"):
        trainer_of(tmp_path, count=8, **reads)
    given = Teacher(teacher_model(), tmp_path / "cache", cache_mode="topk", top_k=4)
    with pytest.raises(InputError, match="cache_mode=topk"):
        trainer_of(tmp_path, **TWO_STAGES, signals="mean_kl", teacher=given)
    trainer_of(tmp_path, curriculum=curriculum_of(8, stages=2), **reads)  # it is not measured there
