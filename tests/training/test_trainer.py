"""Training against a plain torch loop; its stages, its teacher and its stops."""

import gc
import math
import weakref

import pytest
import torch
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
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.nn.utils import clip_grad_norm_

from pocl_fast.answers.rouge import RougeL
from pocl_fast.cutting.cut import cut_layers
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import MetricsLog, read_metrics
from pocl_fast.training.trainer import PoclTrainer


def padded(batch):
    """A batch as a right-padded rectangle, and its labels: -100 on prompts and padding."""
    longest = max(map(len, batch))
    ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), -100)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = torch.tensor(sample.prompt_ids + sample.response_ids)
        mask[row, : len(sample)] = 1
        labels[row, len(sample.prompt_ids) - 1 : len(sample) - 1] = torch.tensor(sample.response_ids)
    return ids, mask, labels


def plain_loss(student, teacher, batch, divergence, temperature, alpha):
    ids, mask, labels = padded(batch)
    with torch.no_grad():
        t = teacher(input_ids=ids, attention_mask=mask).logits
    s = student(input_ids=ids, attention_mask=mask).logits
    kept = labels != -100
    s, t, labels = s[kept], t[kept], labels[kept]
    p, q = log_softmax(t / temperature, -1), log_softmax(s / temperature, -1)
    a, b = (q, p) if divergence == "forward_kl" else (p, q)
    kd = kl_div(a, b, log_target=True, reduction="batchmean") * temperature**2
    return alpha * nll_loss(log_softmax(s, -1), labels) + (1 - alpha) * kd


def plain_training(student, teacher, batches, divergence, temperature, alpha, lr):
    """The losses of one stage: AdamW, cosine to zero, clipping to norm 1."""
    no_decay = [p for n, p in student.named_parameters() if "norm" in n]
    decay = [p for n, p in student.named_parameters() if "norm" not in n]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        loss = plain_loss(student, teacher, batch, divergence, temperature, alpha)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_training_equals_a_plain_loop_with_the_teacher_run_every_step(tmp_path, monkeypatch, divergence):
    batches = []
    before_each_batch(monkeypatch, lambda number, trainer, samples: batches.append(samples))
    setting = {"divergence": divergence, "temperature": 1.33, "alpha": 0.2}
    curriculum = curriculum_of(40, stages=1, temperatures=[1.33], alphas=[0.2])
    student = train(tmp_path, curriculum=curriculum, divergence=divergence, learning_rate=2e-3)
    assert sorted(sample.index for batch in batches for sample in batch) == list(range(40))
    assert [len(batch) for batch in batches] == [4] * 10

    plain = student_model()
    losses = plain_training(plain, teacher_model(), batches, **setting, lr=2e-3)
    logged = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in logged] == [1, 5, 10]
    want = [losses[0], sum(losses[1:5]) / 4, sum(losses[5:10]) / 5]
    assert [r["loss"] for r in logged] == pytest.approx(want, rel=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in weights_of(student).items():
        torch.testing.assert_close(parameter, weights_of(plain)[name], rtol=1e-3, atol=1e-4)


def test_the_logged_parts_make_up_the_loss(tmp_path):
    train(tmp_path, curriculum=curriculum_of(20, stages=1, temperatures=[2.0], alphas=[0.3]))
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        if record["step"] == 1 and "loss" in record:  # later ones are means of means
            want = 0.3 * record["ce"] + 0.7 * 4 * record["divergence"]
            assert record["loss"] == pytest.approx(want, rel=1e-5)
            assert (record["temperature"], record["alpha"], record["stage"]) == (2.0, 0.3, 0)
            assert record["supervised_tokens"] < record["tokens"]
            return
    pytest.fail("no first step in metrics.jsonl")


def test_two_small_batches_accumulated_are_one_large_batch(tmp_path):
    curriculum = curriculum_of(4, stages=1)
    students, firsts = [], []
    for size, accumulated in ((4, 1), (2, 2)):
        folder = tmp_path / str(size)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        students.append(train(folder, curriculum=curriculum, **sizes))
        [first] = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
        firsts.append(first)
    for name in ("loss", "grad_norm", "ce", "divergence", "supervised_tokens"):
        assert firsts[1][name] == pytest.approx(firsts[0][name], rel=1e-5)
    one, two = map(weights_of, students)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    assert not same_bits(one, weights_of(student_model()))


def test_the_teachers_body_runs_once_a_sample_over_all_stages_and_then_leaves_memory(tmp_path):
    model = teacher_model()
    teacher = Teacher(model, tmp_path / "teacher_cache")
    lengths = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: lengths.extend(kwargs["packed_lengths"]), with_kwargs=True
    )
    body = weakref.ref(model)
    del model
    train(tmp_path, curriculum=curriculum_of(16, stages=4), teacher=teacher, epochs_per_stage=2)
    _, encoded = encoded_samples(16)
    assert sorted(lengths) == sorted(map(len, encoded))
    gc.collect()
    assert body() is None
    assert teacher.logits(encoded[:1]).shape == (len(encoded[0].response_ids), 259)


def test_training_leaves_the_teachers_weights_as_they_were(tmp_path):
    whole = teacher_model()
    student = cut_layers(whole, 2)  # shares no tensor with its teacher
    before = weights_of(whole)
    trained = train(
        tmp_path,
        curriculum=curriculum_of(8, stages=1),
        student=student.float().requires_grad_(True),
        teacher=Teacher(whole, tmp_path / "teacher_cache"),
    )
    assert same_bits(weights_of(whole), before)
    assert not torch.equal(trained.get_input_embeddings().weight, before["model.embed_tokens.weight"])


def test_a_stage_starts_from_the_checkpoint_of_the_one_before_with_the_best_rouge(tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.2, 0.3, 0.3, 0.1])  # three epochs of two stages
    seen, starts, evaluate = [], [], PoclTrainer.evaluate

    def scored(answers, references, **_):
        value = torch.full((len(answers),), next(scores)).numpy()
        return RougeL(value, value, value)

    def recorded(self, *args, **kwargs):
        seen.append(weights_of(self.model))
        return evaluate(self, *args, **kwargs)

    def start(number, trainer, samples):
        if trainer.planned().place(trainer.state.global_step).step_in_stage == 0:
            starts.append(weights_of(trainer.model))

    monkeypatch.setattr("pocl_fast.answers.evaluation.rouge_l", scored)
    monkeypatch.setattr(PoclTrainer, "evaluate", recorded)
    before_each_batch(monkeypatch, start)
    initial = weights_of(student_model())
    student = train(tmp_path, curriculum=curriculum_of(8, stages=2), epochs_per_stage=3)
    assert len(seen) == 6
    assert same_bits(starts[0], initial)
    assert same_bits(starts[1], seen[1])
    assert not same_bits(seen[3], seen[4])
    logged = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval_rouge_l" in r]
    assert [r["eval_rouge_l"] for r in logged] == pytest.approx([10, 50, 20, 30, 30, 10])
    lower = min((3, 4), key=lambda place: logged[place]["eval_cross_entropy"])
    assert same_bits(weights_of(student), seen[lower])  # of two equal ones


def test_each_stage_has_its_temperature_alpha_and_samples_and_a_cosine_from_the_peak(tmp_path, monkeypatch):
    seen = []
    before_each_batch(
        monkeypatch,
        lambda number, trainer, samples: seen.append(
            (trainer.objective.temperature, trainer.objective.alpha, {sample.index for sample in samples})
        ),
    )
    curriculum = curriculum_of(12, stages=3, temperatures=[1, 2, 3], alphas=[0.3, 0.2, 0.1])
    train(tmp_path, curriculum=curriculum, learning_rate=1e-3, logging_steps=1)
    assert [(temperature, alpha) for temperature, alpha, _ in seen] == [(1, 0.3)] + [(2, 0.2)] * 2 + [(3, 0.1)] * 3
    assert set().union(*(samples for _, _, samples in seen[1:3])) == set(range(8))
    rates = {r["step"]: r["learning_rate"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r}
    assert [rates[step] for step in (1, 2, 4)] == [1e-3] * 3
    assert [rates[step] for step in (3, 5, 6)] == pytest.approx([5e-4, 7.5e-4, 2.5e-4])


def test_a_nan_loss_stops_with_samples_stage_step_and_advice(tmp_path, monkeypatch):
    def damage(number, trainer, samples):
        trainer.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")

    before_each_batch(monkeypatch, damage)
    with pytest.raises(
        InputError, match=r"the loss of sample \d+ \(record \d+\), .* at stage 1, step 1: .*\(now 0.0001\)"
    ):
        train(tmp_path, curriculum=curriculum_of(8, stages=1))


def test_a_student_with_a_nan_weight_is_refused_before_it_trains(tmp_path):
    student = student_model()
    student.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"student LlamaForCausalLM are NaN: so is its model.layers.0.mlp.up_proj"):
        trainer_of(tmp_path, curriculum=curriculum_of(8, stages=1), student=student)


def test_weights_that_turn_nan_between_two_logs_are_never_saved(tmp_path, monkeypatch):
    def damage(number, trainer, samples):
        if number == 3:
            trainer.model.model.norm.weight.data[0] = float("nan")

    before_each_batch(monkeypatch, damage)
    with pytest.raises(InputError, match=r"the loss of sample .* is not finite at stage 1, step 3"):
        train(tmp_path, curriculum=curriculum_of(16, stages=1), save_minutes=1e-9)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_damaged_last_line_of_metrics_is_left_out_and_gone_after_the_next_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "st')
    assert [r["step"] for r in read_metrics(path)] == [1, 5]
    log = MetricsLog(path)
    log.rewind(3)
    log.write({"step": 4})
    assert path.read_text().splitlines() == ['{"step": 1, "loss": 2.0}', '{"step": 4}']
