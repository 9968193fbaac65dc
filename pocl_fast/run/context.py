"""What the steps of a run share: its directory, its options, and what is loaded for them, each thing once.

Knows how options name data, models and engines. Does not know what the steps do with them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pocl_fast.answers import vllm
from pocl_fast.answers.engine import Engine, configured_ends
from pocl_fast.answers.likelihood import KeptStates, LoadedModel
from pocl_fast.cutting.layer_choice import check_choice
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.sample_set import SampleSet, read_set, split
from pocl_fast.inputs.adapters import check_fit
from pocl_fast.inputs.left_to_right import check_left_to_right
from pocl_fast.inputs.positions import check_positions
from pocl_fast.inputs.usable import check_model
from pocl_fast.inputs.vocabulary import (
    Rows,
    check_special_tokens,
    configured_rows,
    known_ids,
    rows_of,
    shapes_of,
)
from pocl_fast.models import loading
from pocl_fast.models.lm_head import check_head
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.models.parameters import as_trainable
from pocl_fast.models.placement import choose_device
from pocl_fast.models.precision import Precision, choose_precision
from pocl_fast.options.run import RunConfig
from pocl_fast.records.samples import Sample
from pocl_fast.run.cut_student import cut_of_run
from pocl_fast.run.scored_sets import ScoredSet, check_sets, same_samples, scored_set
from pocl_fast.run.teacher_answers import answered
from pocl_fast.run_directory.directory import RunDirectory, required
from pocl_fast.run_directory.step_inputs import WARMED, warms_up
from pocl_fast.settings.evaluation_sets import NamedSet, evaluations_choose, sets_of
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.pair import (
    Place,
    Vocabulary,
    check_same_vocabulary,
    check_tokens,
    pair_lines,
    places,
)
from pocl_fast.templates.chat_template import unused_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_fast.teacher.teacher import Teacher

Say = Callable[[str], None]


class RunContext:
    """A run's directory and options, and the models and samples that its steps work on, loaded when first asked for."""

    def __init__(self, directory: RunDirectory, config: RunConfig, say: Say = print) -> None:
        """Raises `InputError` for a device that this machine lacks, and for a choice of no layers."""
        check_choice(config.models)
        self.directory, self.config = directory, config
        self.say: Say = say if ranks.is_first() else lambda _: None
        self.path = directory.path
        self.device = choose_device(config.models.device)
        self._teacher_model: Any = None
        self.teacher_states = KeptStates()  # of the evaluation sets, which are scored several times
        self._student: LoadedModel | None = None
        self._is_warmed = False  # whether that is the warmed-up one
        self._compared: frozenset[str] | None = None  # the samples with which the vocabularies were compared
        self._pair_said = self._same_said = False
        self.reports: dict[str, LengthReport] = {}  # of what was read: --train, or a set by its name

    @cached_property
    def precision(self) -> Precision:
        """How matrix products are computed: chosen when a step first asks, on every rank, and kept in the directory."""
        chosen, trusted = self.config.models, self.config.models.trust_remote_code
        shapes = functools.partial(shapes_of, chosen.teacher or chosen.student, trust_remote_code=trusted)
        return choose_precision(chosen.precision, self.device, self.path, shapes=shapes, say=self.say)

    def begins(self, step: str, result: str) -> bool:
        """Whether the step is still to be done, on every rank; a done one says which file has its result. Raises
        `InputError` where it was begun with other options or files."""
        if self.directory.begin(step, self.config):
            return True
        self.say(f"{step}: already done, see {self.path / result}")
        return False

    # -- samples ----------------------------------------------------------------------------------------------------

    @property
    def student_source(self) -> str:
        """Where the student comes from before it is cut. Raises `InputError` where the options name none."""
        chosen = self.config.models
        if chosen.student is None and chosen.student_layers is None:
            raise InputError("give --student, or --student-layers to cut one from the teacher")
        return str(chosen.student or required(chosen.teacher, "--teacher (or --student)"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, which is the teacher's too."""
        trusted = self.config.models.trust_remote_code
        return loading.load_tokenizer(self.student_source, trust_remote_code=trusted)  # type: ignore[no-any-return]

    def check_vocabularies(self) -> None:
        """Raises `InputError` where student and teacher have different tokens or cut texts differently, or where one of
        them has no row for a token of the samples that are loaded. Does it once for these."""
        loaded = frozenset({"train_file", "evaluation_sets"} & vars(self).keys())
        if self._compared is not None and loaded <= self._compared:
            return
        chosen, student = self.config.models, self.student_source
        teacher, trusted = required(chosen.teacher, "--teacher"), chosen.trust_remote_code
        if student != teacher:
            say: Say = self.say if self._compared is None else lambda _: None
            train = self.train_file if "train_file" in loaded else None
            theirs = loading.load_tokenizer(teacher, trust_remote_code=trusted)
            check_same_vocabulary(self.tokenizer, theirs, train, self._place_in_train(), say)
            data = self.config.data
            if line := unused_template(self.encoder.chat, data.template, theirs, data.chat_template):
                say(line)
        if rows := configured_rows(student, trust_remote_code=trusted):
            check_special_tokens(self.tokenizer, rows, "student")
            self._check_tokens(Vocabulary("student", rows), dev=True)
        if student != teacher:
            self._check_tokens(Vocabulary("teacher", configured_rows(teacher, trust_remote_code=trusted)))
        self._compared = loaded

    def _check_tokens(self, vocabulary: Vocabulary, *, dev: bool = False) -> None:
        """Raises `InputError` where a sample that is loaded has a token that a model does not know; `dev` says whether
        the model sees the held-out samples too."""
        if self.train_file_is_loaded:
            check_tokens(self.train_file, vocabulary, self.tokenizer, self._place_in_train())
        if dev and "evaluation_sets" in vars(self):
            check_sets(self.evaluation_sets, vocabulary, self.tokenizer)

    def check_named_model(self) -> None:
        """The same of the one model that the options name, where they name one alone."""
        chosen = self.config.models
        whose, source = ("student", chosen.student) if chosen.student else ("teacher", chosen.teacher)
        if source and (rows := configured_rows(source, trust_remote_code=chosen.trust_remote_code)):
            check_special_tokens(self.tokenizer, rows, whose)
            self._check_tokens(Vocabulary(whose, rows), dev=True)

    def check_stream(self, stream: Iterable[Sequence[tuple[Sample, EncodedSample]]]) -> None:
        """The same for the student and the training samples of a file that is read in pieces, where its tokenizer has
        tokens without a row."""
        rows = configured_rows(self.student_source, trust_remote_code=self.config.models.trust_remote_code)
        if rows is None or max(known_ids(self.tokenizer)) < rows:
            return
        for piece in stream:
            known: Any = {one.index: sample for sample, one in piece}
            data = SampleSet(known, [one for _, one in piece])
            check_tokens(data, Vocabulary("student", rows), self.tokenizer, self._place_in_train())

    def _place_in_train(self) -> Place:
        return places(self.config.data.train, "--train")

    def say_pair(self, *rows_and_sizes: int) -> None:
        """Says how the two models differ, once; see `pair_lines`. Of models that cannot differ nothing is said: give
        no numbers."""
        if not self._pair_said and rows_and_sizes:
            for line in pair_lines(*rows_and_sizes):
                self.say(line)
        self._pair_said = True

    @cached_property
    def encoder(self) -> SampleEncoder:
        """Where the teacher's answers are trained on, answers end at its own stop tokens too."""
        made = encoder_of(self.tokenizer, self.config.data, self.path, self.say)
        chosen = self.config.models
        if self.config.data.data_source == "teacher" and chosen.teacher is not None:
            made.stop_also_at(configured_ends(chosen.teacher, trust_remote_code=chosen.trust_remote_code))
        return made

    @cached_property
    def train_set(self) -> SampleSet:
        """The training samples, with the teacher's answers as references under `--data-source teacher`."""
        as_given = self.config.data.data_source == "data"
        return self.train_file if as_given else self._answered_by_teacher(self.train_file)

    @property
    def train_file_is_loaded(self) -> bool:
        return "train_file" in vars(self)

    @property
    def dev_set(self) -> SampleSet:
        """The held-out samples that the training is watched by, and may choose weights by."""
        first = next((one for one in self.evaluation_sets if one.named.role == "dev"), None)
        return required(first, "--dev (or --held-out)").data  # type: ignore[no-any-return]

    @cached_property
    def evaluation_sets(self) -> list[ScoredSet]:
        """The sets that the student is scored on. Raises `InputError` where there are none."""
        known = required(sets_of(self.config) or None, "--dev (or --held-out)")
        rouge = self.config.generation.rouge_tokenizer
        return [scored_set(one, self.config.data.train, self._data_of(one), rouge, self.say) for one in known]

    def _data_of(self, one: NamedSet) -> SampleSet:
        return self._sides[1] if one.source is None else self._read(one.source, one.option, one.name)

    def say_same_samples(self) -> None:
        """Counts the copies among the training samples, and what of the evaluation sets is among them too, once."""
        if ranks.is_first() and not self._same_said:
            chosen_by = self.evaluation_sets[0] if evaluations_choose(self.config) else None
            for line in same_samples(str(self.config.data.train), self.train_file, self.evaluation_sets, chosen_by):
                self.say(line)
        self._same_said = True

    @property
    def scores_teacher(self) -> bool:
        """Whether evaluations score the teacher too, and the student's divergence from it."""
        return self.config.evaluation.score_teacher and self.config.models.teacher is not None

    @cached_property
    def train_file(self) -> SampleSet:
        """The training samples as they are in the file."""
        return self._sides[0]

    @cached_property
    def _sides(self) -> tuple[SampleSet, SampleSet]:
        return split(self._read(self.config.data.train, "--train", "--train"), self.config.data, self.say)

    def _read(self, given: str | None, option: str, kept: str) -> SampleSet:
        name = required(given, option)
        samples, report = read_set(name, self.encoder, self.config.data, name)
        self.reports[kept] = report
        self.say(report.describe(name))
        return samples

    def _answered_by_teacher(self, samples: SampleSet) -> SampleSet:
        self.check_vocabularies()
        model = self.teacher_model()
        self._check_usable(model, "teacher")
        rows, precision = self._student_rows(model).both, self.precision
        with precision.autocast():
            return answered(
                samples, model, self.encoder, self.config, self.path, precision=precision.of_teacher, rows=rows
            )

    # -- the teacher ------------------------------------------------------------------------------------------------

    def teacher_model(self) -> Any:
        """The teacher, loaded once and kept until `take_cached_teacher`."""
        if self._teacher_model is None:
            from pocl_fast.teacher.loading import load_teacher

            chosen = self.config.models
            probe: Sequence[EncodedSample] = ()
            if chosen.teacher_quantization != "none":  # its divergence from the full model is measured on some
                probe = (self.train_file if self.config.data.train else self.evaluation_sets[0].data).encoded
            self._teacher_model = load_teacher(
                required(chosen.teacher, "--teacher"),
                self.path / "teacher",
                precision=self.precision,
                quantization=chosen.teacher_quantization,
                where=chosen.teacher_device,
                probe_samples=probe,
                trust_remote_code=chosen.trust_remote_code,
                say=self.say,
            )
        return self._teacher_model

    def scoring_teacher(self) -> LoadedModel:
        """The teacher, ready to score each sample's response."""
        self.check_vocabularies()
        return self.ready(self.teacher_model(), "teacher")

    def take_cached_teacher(self) -> Teacher:
        """The teacher with its cache. It owns the model, to free its layers once all samples are cached: the context
        keeps none."""
        from pocl_fast.teacher.loading import cached_teacher

        model, self._teacher_model = self.teacher_model(), None
        return cached_teacher(
            model,
            self.path / "teacher_cache",
            self.config.cache,
            precision=self.precision,
            device=self.device,
            keep_body=self.config.rollouts.rollouts != "none",
            owned=True,
            student_rows=self._student_rows(model).lm_head,
            say=self._say_of("teacher"),
        )

    def _student_rows(self, teacher: Any) -> Rows:
        """The student's rows; the teacher's where a student is cut from it."""
        if self.student_source == self.config.models.teacher:
            return rows_of(teacher)
        rows = configured_rows(self.student_source, trust_remote_code=self.config.models.trust_remote_code)
        return rows_of(self.student().model) if rows is None else Rows(rows, rows)

    # -- the student ------------------------------------------------------------------------------------------------

    def student(self) -> LoadedModel:
        """The student that is measured and trained, warmed up or not, in fp32; kept until `take_student`."""
        return self._kept_student(warmed=warms_up(self.config))

    def given_student(self) -> LoadedModel:
        """The student as it was given, before any training; kept as `student` is."""
        return self._kept_student(warmed=False)

    def take_student(self, *, given: bool = False) -> LoadedModel:
        """The student (or the one that was `given`), for its caller to change: the context keeps none."""
        student, self._student = self.given_student() if given else self.student(), None
        return student

    def _kept_student(self, *, warmed: bool) -> LoadedModel:
        if self._student is None or self._is_warmed != warmed:
            self._student = None  # before the other one takes its memory
            made = self._load_saved(WARMED) if warmed else self._load_student()
            self._student, self._is_warmed = self.ready(made, "student"), warmed
        return self._student

    def trained_student(self) -> LoadedModel:
        """The student that the run trained."""
        return self.ready(self._load_saved("student"), "trained student")

    def _load_saved(self, name: str) -> Any:
        trusted = self.config.models.trust_remote_code
        model = loading.load_model(str(self.path / name), device=self.device, trust_remote_code=trusted)
        model.name_or_path = ""  # adapters for it are saved with it: the run's folder may be moved
        return model

    def _load_student(self) -> Any:
        from pocl_fast.teacher.loading import WITH_STUDENT

        chosen, trusted = self.config.models, self.config.models.trust_remote_code
        whole_and_here = chosen.teacher_quantization == "none" and chosen.teacher_device == WITH_STUDENT
        if chosen.student is None and whole_and_here:
            student = self.teacher_model()
        else:
            student = loading.load_model(self.student_source, device=self.device, trust_remote_code=trusted)
        student = cut_of_run(self, student)  # as it is where the options cut none
        check_fit(student, self.config.adapters)
        loading.make_savable(student, self.say, "student")
        loading.check_saved(self.tokenizer)
        return as_trainable(student)

    # -- every model ------------------------------------------------------------------------------------------------

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt that may be answered; samples are read before models are loaded."""
        return max(self.config.data.max_prompt_length, self.encoder.longest_prompt)

    def ready(self, model: Any, whose: str, say: Say | None = None) -> LoadedModel:
        """The model, with packed batches where these hold for it; `say` instead of the run is told which. Raises
        `InputError` where it has fewer positions than a sample, or a prompt and its answer, may have tokens, and where
        its logits are not its lm_head's."""
        if whose in ("student", "teacher"):
            self._check_usable(model, whose)
        data, answer = self.config.data, self.config.generation.max_new_tokens
        check_positions(model, max(data.max_length, self.longest_prompt + answer), whose)
        with self.precision.autocast():
            check_head(model, whose)
            return LoadedModel(model, packing_ready(model, say or self._say_of(whose)))

    def _check_usable(self, model: Any, whose: str) -> None:
        """Raises `InputError` for what is no causal language model, or has no rows for the tokens that it will see."""
        check_model(model, f"--{whose}", may_be_offloaded=whose == "teacher")
        check_left_to_right(model, f"--{whose}")
        rows = rows_of(model)
        if whose == "student" or self.config.data.data_source == "teacher":  # which answer, and are padded
            check_special_tokens(self.tokenizer, rows.embedding, whose)
        self._check_tokens(Vocabulary(whose, rows.both), dev=whose == "student")

    def _say_of(self, whose: str) -> Say:
        """Prints lines about one of the run's models, which name it."""
        return lambda text: self.say(f"{whose}: {text}")

    def check_engine(self) -> bool:
        """Whether vLLM answers. Raises `InputError` where it is asked for and cannot."""
        return vllm.chosen(self.config.generation.generation_engine, self.device)

    def engine(self, model: Any) -> contextlib.AbstractContextManager[Engine]:
        """What generates the model's answers: vLLM with the model in it where vLLM answers, else torch."""
        return vllm.engine_of(
            model,
            self.encoder,
            self.config.generation,
            max_prompt_length=self.longest_prompt,
            by_vllm=self.check_engine(),
            bf16=self.precision.name == "bf16",
        )
