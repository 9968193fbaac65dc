"""The date that a chat template writes: one for all steps in a folder, on whatever day they are done."""

import datetime

import pytest
import transformers.utils.chat_template_utils as of_transformers
from tiny import CHAT_TEMPLATE, arithmetic, tiny_model, tiny_tokenizer, write_jsonl
from tiny_run import options, run, select
from tiny_training import same_bits, weights_of

from pocl_fast.data.encoding import encoder_of
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError
from pocl_fast.templates.template_date import DATE_FILE
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.trainer import PoclTrainer

FORMATS = ("%d %b %Y", "%Y-%m-%d", "%A, %-d. %B %y", "100 %% on %j at %H:%M:%S", "%D %T", "no date", "%x %X %c", "%")
LLAMA = (  # 3.2: a variable that may be given, today where it is not
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ 'Today Date: ' + date_string + '\n' }}"
)


@pytest.fixture
def clock(monkeypatch):
    """The day that transformers tells templates."""

    class Clock(datetime.datetime):
        day = datetime.datetime(2026, 1, 3, 14, 5, 6)

        @classmethod
        def now(cls, tz=None):
            return cls.day

    monkeypatch.setattr(of_transformers, "datetime", Clock)
    return Clock


def dated(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + CHAT_TEMPLATE
    return tokenizer


def head_of(folder, tokenizer, said=None, **given):
    made = encoder_of(tokenizer, DataOptions(**given), folder, [].append if said is None else said.append)
    sample = samples_from([{"prompt": "a", "response": "b"}], "x")[0]
    return tokenizer.decode(made.encode_prompt(sample)).partition("<|start|>")[0]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_as_transformers_writes_it(form, clock, tmp_path):
    tokenizer = dated("{{ '[' + strftime_now('" + form + "') + ']' }}")
    turns = [{"role": "user", "content": "a"}]
    want = tokenizer.apply_chat_template(turns, tokenize=False).partition("<|start|>")[0]
    if form != "%":  # no directive: C leaves open what becomes of it
        assert head_of(tmp_path, tokenizer) == want


def test_a_date_within_a_macro_and_of_a_format_that_is_computed(clock, tmp_path):
    template = "{% macro day(form) %}{{ strftime_now(form) }}{% endmacro %}{{ day('%d ' + '%b') }}\n"
    assert head_of(tmp_path, dated(template)) == "03 Jan\n"


def test_another_day_in_the_folder_has_the_first_days_date_and_a_new_folder_its_own(clock, tmp_path):
    tokenizer, said = dated(LLAMA), []
    assert head_of(tmp_path / "one", tokenizer, said) == "Today Date: 03 Jan 2026\n"
    clock.day = datetime.datetime(2026, 1, 4)
    assert head_of(tmp_path / "one", tokenizer, said) == "Today Date: 03 Jan 2026\n"
    assert head_of(tmp_path / "two", tokenizer, said) == "Today Date: 04 Jan 2026\n"
    assert ["03 Jan 2026" in line for line in said] == [True, True, False]
    assert all("the chat template writes the date" in line for line in said)


def test_a_date_that_is_given_wins(clock, tmp_path):
    given = {"chat_template_kwargs": {"date_string": "1 May 1999"}}
    assert head_of(tmp_path, dated(LLAMA), **given) == "Today Date: 1 May 1999\n"


def test_templates_without_a_date_keep_none(tmp_path):
    said = []
    assert head_of(tmp_path, dated("Today Date: 26 Jul 2024\n"), said) == "Today Date: 26 Jul 2024\n"
    assert (said, list(tmp_path.iterdir())) == ([], [])


def test_a_damaged_date_is_said(tmp_path):
    (tmp_path / DATE_FILE).write_text("yesterday")
    with pytest.raises(InputError, match=f"{DATE_FILE} holds no date but 'yesterday': delete it"):
        head_of(tmp_path, dated(LLAMA))


def test_a_training_that_goes_on_the_next_day_ends_in_the_same_bits(clock, tmp_path):
    def train(folder, steps):
        args = PoclConfig(
            str(tmp_path / folder), use_cpu=True, precision="fp32", max_length=160, max_prompt_length=120, stages=1,
            epochs_per_stage=2, per_device_train_batch_size=4, eval_strategy="no", max_steps=steps, max_new_tokens=2,
        )  # fmt: skip
        made = PoclTrainer(tiny_model().float(), tiny_model(layers=3, seed=1), args, arithmetic(8), None, dated(LLAMA))
        made.train(resume_from_checkpoint=True)
        return weights_of(made.model)

    whole = train("whole", -1)
    train("resumed", 2)
    clock.day = datetime.datetime(2027, 2, 5)
    assert same_bits(train("resumed", -1), whole)


def test_the_steps_of_a_run_on_several_days_have_one_date(clock, tmp_path, capsys):
    tiny_model(layers=4).save_pretrained(tmp_path / "teacher")
    dated(LLAMA).save_pretrained(tmp_path / "teacher")
    write_jsonl(tmp_path / "train.jsonl", arithmetic(4))
    write_jsonl(tmp_path / "dev.jsonl", arithmetic(2, 50))
    words = options(tmp_path, max_length=160, max_prompt_length=120, stages=1, eval_seeds=(1,), batch_size=2)
    for day, command in enumerate(("measure", "rank", "cache", "train", "evaluate"), start=10):
        clock.day = datetime.datetime(2026, 1, day)
        assert run(command, tmp_path / "out", *select(words, command)) == 0, command
    said = [line for line in capsys.readouterr().out.splitlines() if "writes the date" in line]
    assert len(said) >= 4
    assert all("10 Jan 2026" in line for line in said)
    assert len(list((tmp_path / "out" / "teacher_cache").iterdir())) == 1
    kept = [path.read_text() for path in (tmp_path / "out").rglob(DATE_FILE)]
    assert set(kept) == {"2026-01-10T00:00:00\n"}
