"""On-policy data: which batches are the student's own, what the replay buffer gives back, and exact resumption."""

import json
import random

import numpy as np
import pytest
import torch
from ranks import gloo
from tiny import tiny_model
from tiny_cache import samples

from pocl_fast.answers.answerer import Answerer, AnswerLimits, answered
from pocl_fast.answers.decoding import generate
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import pack
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import supervised_hidden
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.rollouts import Policy, Rollouts

END = 258
LIMITS = AnswerLimits(max_new_tokens=6, max_length=64, end_id=END)
STEPS = 400


class Student:
    """Answers a prompt with four tokens made from its last token, its id and the seed, and counts the calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, sample_ids, seed):
        self.calls += 1
        keys = zip(prompts, sample_ids, strict=True)
        return [np.random.default_rng([prompt[-1], i, seed]).integers(0, 250, 4).tolist() for prompt, i in keys]


def rollouts(policy, *, student=None, seed=0, total_steps=STEPS, limits=LIMITS, threshold=0.0, **numbers):
    student = student or Student()
    one = Rollouts(Policy(policy, **numbers), student, limits, total_steps=total_steps, seed=seed)
    one.threshold = threshold
    return one


def sources(one, steps=STEPS, many=None):
    return [one.batch(many or samples(4), step).source for step in range(steps)]


# -- policies -------------------------------------------------------------------------------------------------------


def test_without_rollouts_every_batch_is_the_data_and_nothing_is_generated():
    student = Student()
    one = rollouts("none", student=student)
    for step in range(20):
        assert one.batch(samples(4), step) == (samples(4), "data")
    assert (student.calls, one.generated, one.seconds) == (0, 0, 0.0)


# 400 draws of a fair coin: the standard deviation is 10.
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_gkd_answers_that_share_of_the_batches(share):
    student = Student()
    one = rollouts("gkd", student=student, lmbda=share)
    said = sources(one)
    assert set(said) <= {"data", "student"}
    assert said.count("student") == pytest.approx(share * STEPS, abs=40 if 0 < share < 1 else 0)
    assert student.calls == said.count("student")
    assert (one.generated, one.replayed) == (4 * student.calls, 0)
    assert one.state_dict()["buffer"] == []


def test_a_generated_batch_has_the_batchs_prompts_and_the_students_answers():
    one = rollouts("gkd", lmbda=1.0)
    made, source = one.batch(samples(6), 3)
    assert source == "student"
    assert [(m.index, m.prompt_ids) for m in made] == [(s.index, s.prompt_ids) for s in samples(6)]
    assert all(len(m.response_ids) == 5 and m.response_ids[-1] == END and not m.truncated for m in made)
    again, later = one.batch(samples(6), 3).samples, one.batch(samples(6), 4).samples
    assert made == again
    assert all(m.response_ids != x.response_ids for m, x in zip(made, later, strict=True))


def test_mixed_trains_on_draws_from_the_buffer_into_which_the_answers_went():
    one = rollouts("mixed", mixed_alpha=1.0, replay_capacity=20)
    first = one.batch(samples(4), 0)
    assert first.source == "replay"
    fresh = rollouts("gkd", lmbda=1.0).batch(samples(4), 0).samples
    assert sorted(first.samples, key=lambda s: s.index) == fresh  # nothing else is in it yet
    old = 0
    for step in range(1, 60):
        drawn = one.batch(samples(4), step).samples
        now = {s.fingerprint for s in rollouts("gkd", lmbda=1.0).batch(samples(4), step).samples}
        assert len({s.fingerprint for s in drawn}) == 4  # none twice
        old += sum(s.fingerprint not in now for s in drawn)
    assert old == pytest.approx(59 * 4 * 16 / 20, abs=35)
    assert len(one.state_dict()["buffer"]) == 20
    assert (one.generated, one.replayed) == (240, 240)


def test_mixed_leaves_the_rest_of_the_batches_as_they_are():
    said = sources(rollouts("mixed", mixed_alpha=0.3))
    assert said.count("replay") == pytest.approx(0.3 * STEPS, abs=40)
    assert said.count("data") == STEPS - said.count("replay")


def test_adaptive_starts_with_the_data_alone():
    one = rollouts("adaptive")
    assert set(sources(one)) == {"data"}


def test_the_threshold_grows_when_the_dev_loss_has_risen_since_it_last_grew():
    one = rollouts("adaptive", loss_eps=0.1)
    thresholds = []
    for loss in (2.0, 2.05, 1.5, 2.09, 2.1, 2.15, 2.2, 2.1, 2.4):
        one.dev_loss(loss)
        thresholds.append(one.threshold)
    #               first          2.1 ≥ 2.0 + 0.1   2.2 ≥ 2.1 + 0.1   2.4 ≥ 2.2 + 0.1
    assert thresholds == [0, 0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3]


def test_the_threshold_stops_at_one_and_other_policies_have_none():
    one, other = rollouts("adaptive"), rollouts("gkd")
    for loss in range(20):
        one.dev_loss(loss)
        other.dev_loss(loss)
    assert (one.threshold, other.threshold) == (1.0, 0.0)
    with pytest.raises(ValueError, match="a dev loss of nan"):
        one.dev_loss(float("nan"))


def test_adaptive_answers_until_the_buffer_is_full_and_less_and_less_from_then_on():
    one = rollouts("adaptive", threshold=0.8, replay_capacity=20, total_steps=STEPS)
    said = sources(one)
    first = said.index("replay")
    assert said[:first].count("student") >= 5  # 5 batches of 4 fill it
    assert said.count("data") == pytest.approx(0.2 * STEPS, abs=32)
    halves = said[first : STEPS // 2], said[STEPS // 2 :]
    fresh = [half.count("student") / len(half) for half in halves]
    assert fresh == pytest.approx([0.8 * 0.75, 0.8 * 0.25], abs=0.12)  # φ (1 − step / steps), its mean in each half
    assert set(sources(one, 3)) <= {"data", "student", "replay"}


@pytest.mark.parametrize(("ratio", "shares"), [("increasing", (0.25, 0.75)), ("constant", (0.5, 0.5))])
def test_the_share_of_fresh_answers_follows_the_replay_ratio(ratio, shares):
    said = sources(rollouts("adaptive", threshold=1.0, replay_capacity=1, replay_ratio=ratio))
    fresh = [half.count("student") / len(half) for half in (said[: STEPS // 2], said[STEPS // 2 :])]
    assert fresh == pytest.approx(shares, abs=0.12)


def test_what_comes_again_is_the_newest_the_buffer_holds_and_no_more_than_it_holds():
    one = rollouts("adaptive", threshold=1.0, replay_capacity=4, replay_ratio="constant")
    newest = []
    for step in range(50):
        batch = one.batch(samples(6)[2 * (step % 3) :][:2], step)
        if batch.source == "student":
            newest = [*newest, *batch.samples][-4:]
        else:
            assert set(batch.samples) <= set(newest)
            assert batch.samples[0] != batch.samples[1]
    bigger = one.batch(samples(6), 0)  # more places than the buffer has samples
    assert len(bigger.samples) == 6


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"rollouts": "always"}, "rollouts 'always': must be one of none, gkd, mixed, adaptive"),
        ({"lmbda": 1.5}, "lmbda 1.5: a probability is within 0 and 1"),
        ({"mixed_alpha": -0.1}, "mixed_alpha -0.1: a probability is within 0 and 1"),
        ({"loss_eps": float("nan")}, "loss_eps nan: must not be negative"),
        ({"replay_capacity": 0}, "replay_capacity 0: must be at least 1 sample"),
        ({"replay_ratio": "none"}, "replay_ratio 'none': must be one of decreasing, increasing, constant"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, says):
    with pytest.raises(InputError) as error:
        Policy(**numbers)
    assert str(error.value) == says


# -- determinism ----------------------------------------------------------------------------------------------------


def training(one, start, end):
    """What each step trains on; the dev loss rises every 10 steps."""
    seen = []
    for step in range(start, end):
        seen.append(one.batch([samples(12)[(step * 5 + i) % 12] for i in range(4)], step))
        if step % 10 == 9:
            one.dev_loss(2.0 + 0.02 * step)
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002 (these take no part)
    return seen


@pytest.mark.parametrize("policy", ["gkd", "mixed", "adaptive"])
@pytest.mark.parametrize("stop", [0, 7, 55, 99])
def test_a_run_that_goes_on_from_its_state_sees_what_it_would_have_seen(policy, stop):
    numbers = {"replay_capacity": 10, "total_steps": 100}
    whole = rollouts(policy, **numbers)
    want = training(whole, 0, 100)
    assert len({source for _, source in want}) >= 2
    first = rollouts(policy, **numbers)
    training(first, 0, stop)
    state = json.loads(json.dumps(first.state_dict()))
    random.seed(stop), np.random.seed(stop), torch.manual_seed(stop)  # noqa: NPY002
    second = rollouts(policy, **numbers)
    second.load_state_dict(state)
    assert training(second, stop, 100) == want[stop:]
    ends = [{name: value for name, value in one.state_dict().items() if name != "seconds"} for one in (whole, second)]
    assert ends[0] == ends[1]


def test_another_seed_is_another_run():
    assert training(rollouts("gkd"), 0, 30) == training(rollouts("gkd"), 0, 30)
    assert training(rollouts("gkd"), 0, 30) != training(rollouts("gkd", seed=1), 0, 30)


def test_the_state_is_small_and_plain():
    one = rollouts("mixed", mixed_alpha=1.0)
    training(one, 0, 50)
    state = json.dumps(one.state_dict())
    assert len(state) < 200 * 120  # 200 samples of 4 prompt tokens and 5 response tokens
    assert rollouts("mixed").state_dict()["accepted_loss"] is None


def _of_a_rank(policy, numbers):
    one = rollouts(policy, **numbers)
    seen = []
    for step in range(40):
        batch = [samples(12)[(step * 5 + i) % 12] for i in range(5)]
        mine = batch[:2] if ranks.rank() == 0 else batch[2:]  # unequal, and none for one rank in some steps
        if step % 7 == 3:
            mine = batch if ranks.rank() == 0 else []
        if ranks.world_size() == 1:
            mine = batch
        made = one.batch(mine, step)
        seen.append((made.source, dict(zip([s.index for s in mine], made.samples, strict=True))))
        one.dev_loss(2.0 + 0.2 * step)
    state = one.state_dict()
    del state["seconds"]
    return seen, state


@gloo
@pytest.mark.parametrize("policy", ["gkd", "mixed", "adaptive"])
def test_two_ranks_train_on_what_one_would_and_keep_the_same_state(two_ranks, policy):
    numbers = {"replay_capacity": 15, "replay_ratio": "constant"}
    alone, state = _of_a_rank(policy, numbers)
    assert len({source for source, _ in alone}) >= 2
    (first, a), (second, b) = two_ranks(_of_a_rank, policy, numbers)
    assert a == b == state
    for (source, want), (s, mine), (t, theirs) in zip(alone, first, second, strict=True):
        assert s == t == source
        assert mine | theirs == want


# -- answers --------------------------------------------------------------------------------------------------------


def sample_of(prompt, response=(1, 2)):
    return EncodedSample(7, tuple(range(prompt)), response, False)


@pytest.mark.parametrize(
    ("answer", "prompt", "response", "truncated"),
    [
        ([], 4, (END,), False),  # nothing but the end
        ([9, 8], 4, (9, 8, END), False),
        ([9] * 5, 4, (9,) * 5 + (END,), False),
        ([9] * 6, 4, (9,) * 6, True),  # cut at max_new_tokens: it had not ended
        ([9, 8, 7], 61, (9, 8, 7), True),  # no room for the end within max_length
        ([9, 8], 61, (9, 8, END), False),
        ([9, 8, 7], 63, (9,), True),
    ],
)
def test_an_answer_ends_with_the_end_token_unless_it_was_cut(answer, prompt, response, truncated):
    made = answered(sample_of(prompt), answer, LIMITS)
    assert (made.response_ids, made.truncated) == (response, truncated)
    assert (made.index, made.prompt_ids) == (7, tuple(range(prompt)))
    assert len(made) <= LIMITS.max_length


def test_a_models_answers_are_sampled_by_seed_and_id_and_its_mode_comes_back():
    model = tiny_model().train()
    ask = Answerer(TorchEngine(model, 256, batch_size=2), LIMITS, {END}, temperature=1.0)
    prompts = [sample.prompt_ids for sample in samples(5)]
    answers = ask(prompts, [3, 1, 4, 1, 5], 17)
    assert model.training
    assert ask(prompts[::-1], [5, 1, 4, 1, 3], 17) == answers[::-1]
    assert ask(prompts, [3, 1, 4, 1, 5], 18) != answers
    model.eval()
    want = generate(
        model,
        prompts,
        max_new_tokens=6,
        end_ids={END},
        pad_id=256,
        temperature=1.0,
        seed=17,
        sample_ids=[3, 1, 4, 1, 5],
    )
    assert answers == want
    assert not model.training
    greedy = Answerer(TorchEngine(model, 256), LIMITS, {END}, temperature=0.0)
    assert greedy(prompts, range(5), 1) == greedy(prompts, range(5), 2)


def test_the_students_own_answers_are_trained_on_as_they_were_sampled():
    model = tiny_model()
    ask = Answerer(TorchEngine(model, 256), LIMITS, {END})
    made = rollouts("gkd", student=ask, lmbda=1.0).batch(samples(3), 0).samples
    assert all(0 < len(m.response_ids) <= 6 for m in made)
    assert [m.truncated for m in made] == [m.response_ids[-1] != END for m in made]


def test_a_student_trained_on_its_own_answers_comes_closer_to_the_teacher_on_them(tmp_path):
    student, teacher_model = tiny_model(seed=0), tiny_model(seed=1)
    enable_packing(student)
    enable_packing(teacher_model)
    teacher = Teacher(teacher_model, tmp_path, keep_body=True)
    one = rollouts("gkd", student=Answerer(TorchEngine(student, 256), LIMITS, {END}), lmbda=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        made, _ = one.batch(samples(8), step)
        batch = pack(made)
        hidden = supervised_hidden(student.get_decoder(), batch, packed=True)
        objective = Objective("reverse_kl", alpha=0.0)
        loss = linear_distillation_loss(
            hidden, student.lm_head.weight, teacher.live(made), batch.labels, objective
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert one.generated == 320
    assert not list(tmp_path.rglob("*.safetensors"))
