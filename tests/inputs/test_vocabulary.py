"""Ids that a tokenizer has no token for, in whatever answers; devices by their names."""

import pytest
import torch
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer
from tiny_run import make_inputs, options, run, select
from tiny_training import LIMITS

from pocl_fast.answers.decoding import generate
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.inputs.vocabulary import configured_rows, rows_of, tokenless_ids
from pocl_fast.models.placement import choose_device
from pocl_fast.options.answers import GenerationOptions
from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

PADDED = 300  # rows of a model whose tokenizer has 259 tokens


def padded_model(**kwargs):
    """A model that mostly chooses among the rows that no token has."""
    model = tiny_model(vocab_size=PADDED, tied=False, **kwargs)
    with torch.no_grad():
        model.lm_head.weight[259:] = 5 * model.lm_head.weight[: PADDED - 259]
    return model


def test_a_models_rows_are_counted_from_its_weights_and_from_its_configuration(tmp_path):
    model = tiny_model(vocab_size=PADDED)
    assert (rows_of(model).embedding, rows_of(model).lm_head) == (PADDED, PADDED)
    model.resize_token_embeddings(260)
    assert rows_of(model).both == 260
    assert configured_rows(str(save_tiny(tmp_path, vocab_size=PADDED))) == PADDED


def test_tokens_that_are_added_later_are_known_and_holes_are_not():
    tokenizer = tiny_tokenizer()
    assert tokenless_ids(tokenizer, 261) == [259, 260]
    tokenizer.add_tokens(["<tool>"])
    assert tokenless_ids(tokenizer, 261) == [260]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_has_no_id_without_a_token_and_the_others_as_if_it_were_not_there(temperature):
    prompts = [[1, 2, 3], [70, 71], [5, 6, 7, 8]]
    setting = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    model = padded_model()
    free = generate(model, prompts, end_ids={258}, pad_id=256, **setting)
    assert any(token >= 259 for answer in free for token in answer)
    engine = TorchEngine.of(model, SampleEncoder(tiny_tokenizer()), GenerationOptions())
    answers = engine.generate(prompts, sample_ids=range(3), end_ids={258}, **setting)
    assert all(token < 259 for answer in answers for token in answer)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:259])  # the same model without these rows
    model.config.vocab_size = 259
    if temperature == 0:  # sampling draws its numbers for blocks of the vocabulary's length
        assert answers == generate(model, prompts, end_ids={258}, pad_id=256, **setting)


def test_the_students_own_answers_and_the_teachers_have_tokens_alone(tmp_path):
    seen = []
    args = PoclConfig(
        str(tmp_path), use_cpu=True, precision="fp32", curriculum="none", epochs_per_stage=1, stages=1,
        eval_strategy="no", rollouts="gkd", lmbda=1.0, data_source="teacher", max_new_tokens=6, max_length=96,
        max_prompt_length=80, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = PoclTrainer(
        padded_model(seed=1).float(), padded_model(layers=3), args, arithmetic(4), None, tiny_tokenizer()
    )
    assert all(max(sample.response_ids) < 259 for sample in trainer.samples.encoded)
    live = Teacher.live
    trainer.teacher.live = lambda samples: seen.extend(samples) or live(trainer.teacher, samples)
    trainer.train()
    assert len(seen) == 4
    assert all(max(sample.response_ids) < 259 for sample in seen)


def test_a_run_with_padded_models_measures_and_evaluates_answers_of_tokens(tmp_path, monkeypatch):
    inputs, answers = make_inputs(tmp_path, train=4, dev=2), []
    padded_model(layers=2).save_pretrained(inputs / "teacher")
    answer = TorchEngine.generate
    monkeypatch.setattr(
        TorchEngine, "generate", lambda *args, **kwargs: answers.extend(got := answer(*args, **kwargs)) or got
    )
    assert run("measure", tmp_path / "out", *select(options(inputs), "measure")) == 0
    assert len(answers) == 4
    assert all(token < 259 for answer in answers for token in answer)


def test_the_loss_is_still_over_every_row():
    """A padded row is one of the model's: what it says of it is learnt."""
    from pocl_fast.answers.likelihood import cross_entropy

    samples = samples_from(arithmetic(2), "tiny")
    encoded, _ = encode_all(samples, SampleEncoder(tiny_tokenizer()), **LIMITS)
    model = padded_model()
    ids = torch.tensor([encoded[0].prompt_ids + encoded[0].response_ids])
    logits = model(ids).logits[0, len(encoded[0].prompt_ids) - 1 : -1]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(encoded[0].response_ids))
    assert cross_entropy(model, encoded[:1], packed=False)[0] == pytest.approx(float(want), rel=1e-4)


def test_names_of_devices_are_read_in_any_case():
    assert choose_device(" CPU ") == choose_device("cpu") == torch.device("cpu")
    assert choose_device("Auto") == choose_device("auto")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"^device CUDA:0: this torch .* sees no CUDA device"):
            choose_device("CUDA:0")
    with pytest.raises(InputError, match=r"^--teacher-device xpu: this torch .* cannot use it"):
        choose_device("xpu", option="--teacher-device")


def test_an_answer_has_no_token_that_its_reader_has_no_row_for():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])  # 259
    model = padded_model()
    encoder, options = SampleEncoder(tokenizer), GenerationOptions()
    for rows, least in ((None, 260), (400, 260), (259, 259), (200, 200)):
        assert TorchEngine.of(model, encoder, options, rows=rows).forbidden_ids == list(range(least, PADDED))
