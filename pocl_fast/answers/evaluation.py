"""How good a model's answers are: ROUGE-L and exact match of sampled answers over several seeds, and cross-entropy.

This is the paper's evaluation (arXiv 2506.05695, section 4.1): temperature 1, top-p 1, the best over a sample's
references. Knows samples, engines and scores. Does not know training, nor where results are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pocl_fast.answers.engine import AnswerOptions, Engine, TorchEngine
from pocl_fast.answers.exact_match import exact_matches
from pocl_fast.answers.likelihood import LoadedModel, response_scores
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.rouge_words import Tokenizer, unseen_line
from pocl_fast.answers.sample_scores import SampleScores
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.packed import Rows
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.records.samples import Sample
from pocl_fast.system import ranks
from pocl_fast.system.console import Report, shared_progress


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
    model: LoadedModel,
    data: SampleSet,
    encoder: SampleEncoder,
    *,
    engine: Engine,
    seeds: Sequence[int],
    max_new_tokens: int,
    rouge_tokenizer: Tokenizer = "rouge_score",
    teacher: LoadedModel | None = None,
    name: str = "evaluate",
) -> SampleScores:
    """Scores of the model on each sample of a set, and with a `teacher` its divergence from that. `engine` generates
    the answers by the same model. Every rank must call, works on its share, and has the same result."""
    encoded = data.encoded
    references = [references_of(data.samples[one.index], one, encoder) for one in encoded]
    answers: list[list[str]] = []
    with shared_progress(len(seeds) * len(encoded), name, "answers") as progress:
        for seed in seeds:
            answers.append(
                answer_all(
                    engine,
                    encoded,
                    encoder,
                    max_new_tokens=max_new_tokens,
                    temperature=1.0,
                    seed=seed,
                    references=references,
                    progress=progress,
                )
            )
    rouge = [rouge_l(of_seed, references, tokenizer=rouge_tokenizer).fmeasure for of_seed in answers]
    exact = [exact_matches(of_seed, references) for of_seed in answers]
    means = shared_response_scores(model, encoded, teacher, f"{name}, likelihoods")
    return SampleScores(
        seeds=tuple(seeds),
        answers=list(zip(*answers, strict=True)),
        rouge_l=100 * np.array(rouge).T,
        exact_match=np.array(exact).T,
        cross_entropy=means["cross_entropy"],
        tokens=np.array([one.supervised_count for one in encoded]),
        mean_kl=means.get("mean_kl"),
    )


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
    losses = shared_response_scores(LoadedModel(model, packed), encoded, None, "cross-entropy")["cross_entropy"]
    return float((losses * counts).sum() / counts.sum())


def shared_response_scores(
    model: LoadedModel, encoded: Sequence[EncodedSample], teacher: LoadedModel | None, name: str
) -> dict[str, np.ndarray]:
    """What `response_scores` gives of the samples, computed by all ranks, each of which must call and has all. Where it
    takes longer, a bar with this name shows how far it is."""
    mine = ranks.share([len(sample) for sample in encoded])
    with shared_progress(len(encoded), name, "samples", delay=3) as done:
        scores_of_mine = response_scores(
            model, [encoded[i] for i in mine], teacher, progress=lambda more: done(more * ranks.world_size())
        )
    found = ranks.gather((mine, scores_of_mine))
    scores = {name: np.empty(len(encoded)) for name in found[0][1]}
    for places, columns in found:
        for name, values in columns.items():
            scores[name][places] = values
    return scores
