"""Training on every answer of a conversation: tokens, cache, loss and gradient against plain torch with a mask."""

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_training import curriculum_of, student_model, teacher_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pocl_fast.answers.answerer import AnswerLimits, answered
from pocl_fast.answers.evaluation import mean_token_cross_entropy
from pocl_fast.answers.likelihood import LoadedModel, response_scores
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import fit_all
from pocl_fast.data.packed import Rows, pack
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.loss.objective import Objective
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.records.samples import Sample
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.rollouts import Policy, Rollouts
from pocl_fast.training.trainer import PoclTrainer

EXACT = 1e-5
ALPHA, TEMPERATURE = 0.3, 2.0


def conversation(index, count):
    turns = []
    for i in range(count):
        said = f"{index + i} " * (1 + i % 3)
        turns += [{"role": "user", "content": f"{index} and {i}?"}, {"role": "assistant", "content": said}]
    earlier = tuple(range(1, len(turns) - 1, 2))
    return Sample(index, index + 1, tuple(turns[:-1]), (turns[-1]["content"],), earlier=earlier)


@pytest.fixture(scope="module")
def samples():
    """A conversation of eight answers among shorter ones."""
    given = [conversation(0, 1), conversation(1, 8), conversation(2, 3)]
    limits = {"max_length": 500, "max_prompt_length": 80, "long_prompts": "error", "name": "x"}
    fitted, _ = fit_all(given, SampleEncoder(tiny_tokenizer()), **limits)
    return SampleSet([used for used, _ in fitted], [one for _, one in fitted])


def labels_of(sample):
    """-100 but where a token of an answer, or its end, is said next: by the text alone."""
    tokenizer = tiny_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    header = [start, *tokenizer("assistant\n").input_ids]
    labels, place = torch.full((len(sample),), -100), 0
    while place < len(sample):
        if list(sample.ids[place : place + len(header)]) == header:
            place += len(header)
            stop = sample.ids.index(end, place) + 1
            labels[place - 1 : stop - 1] = torch.tensor(sample.ids[place:stop])
            place = stop
        else:
            place += 1
    return labels


def plain(model, sample):
    """Logits and labels at the supervised positions, from one plain call."""
    labels = labels_of(sample)
    logits = model(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0]
    return logits[labels != -100], labels[labels != -100]


def plain_loss(student, teacher, samples):
    parts = [plain(student, one) for one in samples]
    logits, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    with torch.no_grad():
        theirs = torch.cat([plain(teacher, one)[0] for one in samples])
    p, q = (log_softmax(x / TEMPERATURE, -1) for x in (theirs, logits))
    divergence = kl_div(q, p, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * cross_entropy(logits, labels) + (1 - ALPHA) * divergence


def test_all_eight_answers_and_their_ends_are_supervised(samples):
    tokenizer = tiny_tokenizer()
    for one, count in zip(samples.encoded, (1, 8, 3), strict=True):
        labels = labels_of(one)
        places = [place + 1 for place, label in enumerate(labels.tolist()) if label != -100]
        assert [place for start, end in one.spans for place in range(start, end)] == places
        assert len(one.spans) == count
        assert all(tokenizer.decode(one.ids[start:end]).endswith(" <|end|>") for start, end in one.spans)


@pytest.mark.parametrize("rows", list(Rows), ids=lambda rows: rows.name)
def test_logits_of_all_answers_are_those_of_a_plain_call_however_batches_are_laid_out(samples, rows):
    model = student_model()
    batch = pack(samples.encoded)
    with torch.no_grad():
        got = supervised_logits(model, batch, packed=rows)
        want = torch.cat([plain(model, one)[0] for one in samples.encoded])
        part, places = batch.part([2, 1])
        of_part = supervised_logits(model, part, packed=rows)
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(of_part, want[places], rtol=EXACT, atol=EXACT)


def trainer_on(folder, samples, student, rows):
    options = {
        "per_device_train_batch_size": 3, "epochs_per_stage": 1, "max_new_tokens": 2, "precision": "fp32",
        "use_cpu": True, "max_length": 500, "max_prompt_length": 80,
    }  # fmt: skip
    teacher = Teacher(teacher_model(), folder / "cache", cache_dtype=torch.float32)
    given = curriculum_of(3, stages=1, temperatures=[TEMPERATURE], alphas=[ALPHA])
    config = PoclConfig(output_dir=str(folder), **options)
    trainer = PoclTrainer(student, teacher, config, samples, None, tiny_tokenizer(), curriculum=given)
    trainer.packed = rows
    trainer.objective = Objective(alpha=ALPHA, temperature=TEMPERATURE)
    return trainer, teacher


@pytest.mark.parametrize("rows", list(Rows), ids=lambda rows: rows.name)
def test_loss_and_gradient_of_the_trainer_are_plain_torchs_in_one_pass(tmp_path, samples, rows):
    student, theirs = student_model(), student_model()
    trainer, teacher = trainer_on(tmp_path, samples, student, rows)
    batch = trainer.get_train_dataloader().dataset[0, 0]
    seen = []
    student.model.register_forward_hook(lambda *given: seen.append(given[2].last_hidden_state.shape[:2].numel()))
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    lengths = [len(one) for one in batch.samples]
    assert len(lengths) == 3
    assert sum(seen) == (3 * max(lengths) if rows is Rows.PADDED else sum(lengths))
    want = plain_loss(theirs, teacher_model(), batch.samples)
    want.backward()
    torch.testing.assert_close(loss.detach(), want.detach(), rtol=EXACT, atol=EXACT)
    for (name, ours), other in zip(student.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=EXACT, atol=EXACT, msg=name)
    with torch.no_grad():
        logits = torch.cat([plain(teacher_model(), one)[0] for one in batch.samples])
    cached = teacher.hidden(batch.samples) @ teacher.lm_head.weight.T
    torch.testing.assert_close(cached, logits, rtol=EXACT, atol=EXACT)


def test_what_is_measured_is_the_mean_over_all_answers(samples):
    student, teacher = student_model(), teacher_model()
    scores = response_scores(LoadedModel(student, True), samples.encoded, LoadedModel(teacher, True))
    with torch.no_grad():
        for place, one in enumerate(samples.encoded):
            (logits, labels), (theirs, _) = plain(student, one), plain(teacher, one)
            loss = cross_entropy(logits, labels).item()
            q, p = log_softmax(logits, -1), log_softmax(theirs, -1)
            divergence = kl_div(q, p, log_target=True, reduction="batchmean")
            assert scores["cross_entropy"][place] == pytest.approx(loss, rel=EXACT)
            assert scores["mean_kl"][place] == pytest.approx(divergence.item(), rel=EXACT)
        every = [plain(student, one) for one in samples.encoded]
        want = cross_entropy(*(torch.cat(values) for values in zip(*every, strict=True))).item()
    assert mean_token_cross_entropy(student, samples.encoded, packed=True) == pytest.approx(want, rel=EXACT)


LIMITS = AnswerLimits(max_new_tokens=4, max_length=500, end_id=258)


def test_a_models_own_answer_replaces_the_last_one_and_is_trained_on_alone(samples):
    talk = samples.encoded[1]
    one = answered(talk, [65, 66], LIMITS)
    assert (one.prompt_ids, one.response_ids) == (talk.prompt_ids, (65, 66, 258))
    assert one.spans == ((len(talk.prompt_ids), len(talk.prompt_ids) + 3),)
    full = AnswerLimits(max_new_tokens=4, max_length=len(talk.prompt_ids) + 1, end_id=258)
    assert answered(talk, [65, 66], full).response_ids == (65,)


def test_the_replay_buffer_keeps_what_is_supervised_over_a_restart():
    kept = {"index": 3, "truncated": False, "prompt": "1 2 3", "response": "4 5", "supervised": "1 2 3 5"}
    one = Rollouts(Policy("mixed"), lambda *_: [], LIMITS, total_steps=4)
    one.load_state_dict({**one.state_dict(), "buffer": [kept]})
    assert one.state_dict()["buffer"] == [kept]
    drawn = Rollouts(Policy("mixed", mixed_alpha=1.0), lambda *_: [[]], LIMITS, total_steps=4)
    drawn.load_state_dict({**drawn.state_dict(), "buffer": [kept] * 1000})
    [sample] = drawn.batch([EncodedSample(0, (1,), (2,), False)], 0).samples
    assert sample == EncodedSample(3, (1, 2, 3), (4, 5), False, ((1, 2), (3, 5)))
