"""How good a model's answers are: ROUGE-L and exact match of sampled answers over several seeds, and cross-entropy.

This is the paper's evaluation (arXiv 2506.05695, section 4.1): temperature 1, top-p 1, the best over a sample's
references. Knows samples, engines and scores. Does not know training, nor where results are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from pocl_fast.answers.engine import AnswerOptions, Engine, TorchEngine
from pocl_fast.answers.exact_match import exact_match
from pocl_fast.answers.likelihood import cross_entropy
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.rouge_words import Tokenizer, unseen_line
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.packed import Rows
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.records.samples import Sample
from pocl_fast.system import ranks
from pocl_fast.system.console import Report, shared_progress


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one set. ROUGE-L and exact match in percent, of the answer to each sample's last question;
    cross-entropy in nats a token that is trained on."""

    rouge_l: float  # mean over the seeds of the mean over the samples
    rouge_l_spread: float  # standard deviation over the seeds
    exact_match: float
    cross_entropy: float  # of the references, mean over all tokens that are trained on
    seeds: tuple[int, ...]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def answer_all(
    engine: Engine,
    encoded: Sequence[EncodedSample],
    encoder: SampleEncoder,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    references: Sequence[Sequence[str]] | None = None,
    progress: Report | None = None,
) -> list[str]:
    """The engine's answer to each sample's prompt, as the text that is compared with its references (see
    `SampleEncoder.answer_texts`). Every rank must call, answers its share, and has all answers at the end."""
    answers = engine.generate(
        [sample.prompt_ids for sample in encoded],
        sample_ids=[sample.index for sample in encoded],
        end_ids=encoder.end_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        shared=True,
        progress=progress,
    )
    return encoder.answer_texts(answers, references)


def evaluate(
    model: Any,
    samples: Sequence[Sample],
    encoded: Sequence[EncodedSample],
    encoder: SampleEncoder,
    *,
    engine: Engine,
    seeds: Sequence[int],
    max_new_tokens: int,
    packed: Rows | bool,
    rouge_tokenizer: Tokenizer = "rouge_score",
    name: str = "evaluate",
) -> tuple[Scores, list[str]]:
    """Scores of `model`, and its answers under the first seed. `engine` generates the answers by the same model;
    `samples` are all of the file, `encoded` those that fit. Every rank must call, works on its share, and has the same
    result."""
    references = [references_of(samples[one.index], one, encoder) for one in encoded]
    rouge: list[float] = []
    exact: list[float] = []
    first_answers: list[str] = []
    with shared_progress(len(seeds) * len(encoded), name, "answers") as progress:
        for seed in seeds:
            answers = answer_all(
                engine,
                encoded,
                encoder,
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                seed=seed,
                references=references,
                progress=progress,
            )
            rouge.append(100 * float(np.mean(rouge_l(answers, references, tokenizer=rouge_tokenizer).fmeasure)))
            exact.append(100 * exact_match(answers, references))
            first_answers = first_answers or answers
    scores = Scores(
        rouge_l=float(np.mean(rouge)),
        rouge_l_spread=float(np.std(rouge)),
        exact_match=float(np.mean(exact)),
        cross_entropy=mean_token_cross_entropy(model, encoded, packed=packed),
        seeds=tuple(seeds),
        samples=len(encoded),
    )
    return scores, first_answers


class DevOptions(AnswerOptions, Protocol):
    """How the answers to the dev set are generated and scored."""

    @property
    def rouge_tokenizer(self) -> Tokenizer: ...


def dev_scores(
    model: Any, dev: SampleSet, encoder: SampleEncoder, options: DevOptions, *, packed: Rows | bool
) -> tuple[dict[str, float], list[str]]:
    """The scores that training watches, and the answers they are of: `rouge_l` of greedy answers in percent, and
    `cross_entropy` of the references in nats a token. Torch generates the answers. Every rank must call."""
    engine = TorchEngine.of(model, encoder, options)
    references = [references_of(dev.samples[one.index], one, encoder) for one in dev.encoded]
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": 0.0, "seed": 0}
    answers = answer_all(engine, dev.encoded, encoder, references=references, **settings)
    rouge = rouge_l(answers, references, tokenizer=options.rouge_tokenizer).fmeasure
    loss = mean_token_cross_entropy(model, dev.encoded, packed=packed)
    return {"rouge_l": 100 * float(np.mean(rouge)), "cross_entropy": loss}, answers


def references_of(sample: Sample, encoded: EncodedSample, encoder: SampleEncoder) -> list[str]:
    """What an answer to the sample is compared with: its references, or where the answer calls tools, the text that the
    template makes of it, read as a model's answer is."""
    if not sample.answer_turn.get("tool_calls"):
        return list(sample.references)
    said = encoded.response_ids if encoded.truncated else encoded.response_ids[:-1]
    return encoder.answer_texts([said])


def unseen_by_rouge(dev: SampleSet, tokenizer: Tokenizer, name: str) -> str | None:
    """The line that says in how many references of a set ROUGE-L is blind; None where it is in none."""
    texts = (text for one in dev.encoded for text in dev.samples[one.index].references)
    return unseen_line(texts, tokenizer, name)


def mean_token_cross_entropy(model: Any, encoded: Sequence[EncodedSample], *, packed: Rows | bool) -> float:
    """Cross-entropy of the references, in nats, each token that is trained on weighing alike. Every rank must call,
    works on its share, and has the same result."""
    counts = np.array([sample.supervised_count for sample in encoded], dtype=float)
    mine = ranks.share([len(sample) for sample in encoded])
    losses = np.empty(len(encoded))
    theirs = ranks.gather((mine, cross_entropy(model, [encoded[i] for i in mine], packed=packed)))
    for places, values in theirs:
        losses[places] = values
    return float((losses * counts).sum() / counts.sum())
