"""Every option of answers and of difficulty, set to a value that is not its default, reaches what it is for: the
tokens that are drawn, the scores, the order. test_options_reach.py has others, and counts all."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tiny import write_jsonl
from tiny_options import CHANGED, reaches
from tiny_run import scores_of

from pocl_fast.answers import decoding
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.curriculum.fusion import reciprocal_rank_fusion
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.run import context
from pocl_fast.system.errors import InputError


def uncounted(tried, rows):
    def call(*args):
        before = len(rows)
        result = tried(*args)
        del rows[before:]
        return result

    return call


@pytest.fixture
def measured(run_of, monkeypatch):
    """Measures with these options; gives the answers, and the rows of each batch that was answered."""
    rows = []
    forward = transformers.LlamaForCausalLM.forward

    def counted(self, input_ids=None, **kwargs):
        rows.append(input_ids.shape[0])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted)
    trials = ((decoding, "decoding_way"), (decoding, "shares_prefix"), (context, "check_left_to_right"))
    for module, name in trials:  # which try the model out
        monkeypatch.setattr(module, name, uncounted(getattr(module, name), rows))

    def measure(folder, **options):
        rows.clear()
        run = run_of(folder, **options)
        run.measure()
        table = pq.read_table(run.path / "difficulty.parquet")
        return table["answer"].to_pylist(), list(rows)

    return measure


@reaches("max_new_tokens", "generation_batch_size")
def test_answers_are_as_long_and_batches_as_large_as_they_may_be(changed, measured, monkeypatch):
    _, rows = measured("out", **changed)
    steps, length = len(rows), CHANGED["max_new_tokens"]
    assert max(rows) == 3
    _, longer = measured("longer", **(changed | {"max_new_tokens": length + 3}))
    assert len(longer) > steps  # each token of an answer is a forward


@reaches("generation_batch_tokens")
def test_batches_of_answers_have_as_many_tokens_as_they_may_have(changed, measured):
    _, rows = measured("out", **changed)
    _, wider = measured("wider")
    assert max(rows) == 1 < max(wider)  # two prompts and answers are over 40 tokens


@reaches("measure_temperature", "measure_seed")
def test_answers_are_sampled_at_the_temperature_from_the_seed(changed, measured):
    greedy, _ = measured("greedy")
    sampled, _ = measured("sampled", **changed)
    other, _ = measured("other", **(changed | {"measure_seed": 0}))
    assert len({tuple(greedy), tuple(sampled), tuple(other)}) == 3


@reaches("generation_engine")
def test_vllm_answers_where_it_is_asked_for(changed, run_of):
    with pytest.raises(InputError, match="generation_engine vllm"):
        run_of(**changed).measure()


@reaches("rouge_tokenizer")
def test_answers_are_scored_by_the_tokenizers_words(changed, run_of, trainer_with, monkeypatch, tmp_path):
    scored = []

    def recorded(answers, references, *, tokenizer):
        texts = ["答案 12" for _ in answers]  # in place of the tiny model's
        found = rouge_l(texts, references, tokenizer=tokenizer)
        scored.append(float(found.fmeasure.mean()))
        return found

    monkeypatch.setattr("pocl_fast.curriculum.measurer.rouge_l", recorded)
    monkeypatch.setattr("pocl_fast.answers.evaluation.rouge_l", recorded)
    records = [{"prompt": f"{n}", "response": "答3"} for n in range(4)]
    path = write_jsonl(tmp_path / "chinese.jsonl", records)
    run = run_of(train=path, dev=path, **changed)
    run.measure()
    run.evaluate("before")
    trainer_with(changed).evaluate(records)
    want = 2 * (1 / 4 * 1 / 2) / (1 / 4 + 1 / 2)  # of four and two characters one is common
    assert len(scored) == 3
    assert np.allclose(scored, want)
    assert np.allclose(pq.read_table(run.path / "difficulty.parquet")["rouge_l"].to_numpy(), want)


@reaches("signals", "stages", "rrf_k", "temperature", "alpha")
def test_samples_are_ranked_by_the_signals_into_the_stages(changed, run_of):
    lengths, loss = np.array([5, 1, 4, 2, 3, 6]), np.array([1.0, 4.0, 2.0, 9.0, 3.0, 8.0])
    run = run_of(pacing="baby-steps", **changed)
    texts = [""] * 6
    table = {"index": range(6), "rouge_l": [0.0] * 6, "cross_entropy": loss, "answer_length": lengths}
    columns = table | {"prompt": texts, "reference": texts, "answer": texts}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), run.path / "difficulty.parquet")
    run.rank()
    made = Curriculum.load(run.path / "curriculum.json")
    fused = reciprocal_rank_fusion([lengths * 1.0, loss], descending=[False, False], k=7.0, weights=[2.0, 1.0])
    assert made.order.tolist() == fused.order.tolist()
    np.testing.assert_array_equal(made.score, fused.score[fused.order])
    assert [(s.size, s.temperature, s.alpha) for s in made.stages] == [(2, 3.0, 0.5), (4, 3.5, 0.38), (6, 4.0, 0.25)]


@reaches("ties")
def test_samples_with_equal_scores_share_their_rank_or_the_first_has_the_better(
    changed, run_of, trainer_with, tmp_path
):
    lengths, loss = np.array([5, 5, 5, 5, 3, 6]), np.array([4.0, 3.0, 2.0, 1.0, 9.0, 8.0])
    texts = [""] * 6
    table = {"index": range(6), "rouge_l": [0.0] * 6, "cross_entropy": loss, "answer_length": lengths}
    columns = pa.table({name: list(values) for name, values in table.items()} | {"reference": texts})
    scores = {}
    for folder, options in (("first", changed), ("average", {})):
        run = run_of(folder, signals="answer_length,cross_entropy", stages=1, **options)
        pq.write_table(columns, run.path / "difficulty.parquet")
        run.rank()
        made = Curriculum.load(run.path / "curriculum.json")
        scores[folder] = dict(zip(made.order.tolist(), made.score.tolist(), strict=True))
    by_loss = {0: 4, 1: 3, 2: 2, 3: 1, 4: 6, 5: 5}
    of_length = {"first": {0: 2, 1: 3, 2: 4, 3: 5, 4: 1, 5: 6}, "average": {0: 3.5, 1: 3.5, 2: 3.5, 3: 3.5, 4: 1, 5: 6}}
    for folder, rank in of_length.items():
        assert scores[folder] == {i: 1 / (60 + rank[i]) + 1 / (60 + by_loss[i]) for i in range(6)}


@reaches("curriculum")
def test_without_a_curriculum_there_is_one_stage_of_all_samples(changed, trainer_with):
    schedule = trainer_with(changed, given=False).planned()
    assert [stage.size for stage in schedule.stages] == [8]


@reaches("score_teacher")
def test_the_teacher_is_scored_and_compared_with_only_where_it_is_to_be(changed, run_of):
    for folder, given in (("usual", {}), ("without", changed)):
        run = run_of(folder, **given)
        run.evaluate("before")
        run.evaluate("teacher")
        scores = scores_of(run.path)
        assert sorted(scores) == (["before"] if given else ["before", "teacher"])
        assert (scores["before"]["mean_kl"] is None) == bool(given)


@reaches("eval_seeds")
def test_the_evaluation_samples_answers_from_each_seed(changed, run_of, trainer_with):
    run = run_of(**changed)
    run.evaluate("before")
    assert scores_of(run.path)["before"]["seeds"] == [3, 4]
    scores, answers = trainer_with(changed).final_scores()
    assert (scores.seeds, scores.samples, len(answers)) == ((3, 4), 4, 4)
