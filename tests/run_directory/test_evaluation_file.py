"""evaluation.json: what is added to it, and taken away."""

import json

from tiny import arithmetic, tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import read_set
from pocl_fast.options.data import DataOptions
from pocl_fast.run_directory.evaluation_file import content_of, record, without


def found(scores, content="x"):
    return {"role": "dev", "fingerprint": content, "scores": scores}


def read(folder):
    return {name: one["scores"] for name, one in json.loads((folder / "evaluation.json").read_text())["sets"].items()}


def test_scores_are_added_to_those_of_the_same_samples(tmp_path):
    record(tmp_path, "before", {"a": found(1), "b": found(2)})
    record(tmp_path, "after", {"a": found(3), "b": found(4, content="y")})
    assert read(tmp_path) == {"a": {"before": 1, "after": 3}, "b": {"after": 4}}


def test_a_set_that_is_not_evaluated_any_more_goes_with_its_last_scores(tmp_path):
    record(tmp_path, "before", {"a": found(1), "b": found(2)})
    record(tmp_path, "after", {"a": found(3), "b": found(4)})
    record(tmp_path, "before", {"a": found(5)})
    assert read(tmp_path) == {"a": {"before": 5, "after": 3}, "b": {"after": 4}}
    left = without(json.loads((tmp_path / "evaluation.json").read_text()), "after")
    assert {name: one["scores"] for name, one in left["sets"].items()} == {"a": {"before": 5}}


def test_the_fingerprint_is_of_prompts_and_references_in_any_file_and_template():
    def content(records, **options):
        given = DataOptions(max_length=400, max_prompt_length=300, **options)
        encoder = SampleEncoder(tiny_tokenizer(), template=given.template)
        return content_of(read_set(records, encoder, given, "d")[0])

    records = arithmetic(3)
    assert content(records) == content(records, template="alpaca")
    assert len({content(records), content(records[::-1]), content(records[:2]), content(arithmetic(3, start=1))}) == 4
