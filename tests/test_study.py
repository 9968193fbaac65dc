"""benchmarks/study.py with tiny models: it goes on where it was stopped, trains equally long, reports what is done."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_inputs, read_json

from pocl_fast.curriculum.schedule import BatchSize, Schedule
from pocl_fast.curriculum.stages import baby_steps

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("study", "study_cells", "study_training", "study_report", "table_form")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        made = {name: importlib.import_module(name) for name in MODULES}
        yield made
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def study(scripts, tmp_path_factory):
    """A folder with a study's setup, and what its trainings begin from."""
    folder = tmp_path_factory.mktemp("study")
    inputs = make_inputs(folder / "inputs")
    data = folder / "data"
    data.mkdir()
    shutil.copy(inputs / "train.jsonl", data / "dolly_500.jsonl")
    shutil.copy(inputs / "dev.jsonl", data / "sni_3_6.jsonl")
    setup = scripts["study"].Setup(str(data), str(inputs / "teacher"), 16, 8, 2, 2.5, 4, 1e-3, 60, 40)
    scripts["study"].check_setup(folder / "out", setup)
    scripts["study_training"].prepare_all(str(folder / "out"))
    return folder / "out", setup


def wanted(scripts, *names):
    """Trainings of these methods with two seeds."""
    cells = scripts["study"].cells(["main", "parts", "pacing"], [1, 2], None)
    return [(method, seed) for method, seed in cells if method.name in names]


def results(output):
    return {path: read_json(path) for path in sorted(output.rglob("result.json"))}


def test_a_study_that_was_stopped_goes_on_and_keeps_what_was_computed(scripts, study):
    output, setup = study
    names = ("forward_kl, pocl", "forward_kl, none", "sft", "sequence-level KD", "without growing subsets",
             "competence, random order")  # fmt: skip
    cells = wanted(scripts, *names)
    assert len(cells) == 12
    scripts["study"].work(output, setup, cells[:3], 0)
    first = {path: path.stat().st_mtime_ns for path in results(output)}
    assert len(first) == 3
    scripts["study"].work(output, setup, cells, 0)
    made = results(output)
    assert len(made) == 12
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert {(one["method"], one["steps"]) for one in made.values()} == {
        (name, 10) for name in names
    }  # 1 + 2 + 3 + 4 of 16 samples, whatever the method
    again = next(iter(first))
    before = made[again]["scores"]
    again.unlink()
    scripts["study"].work(output, setup, cells, 0)
    assert results(output)[again]["scores"] == before  # the seed decides

    trained = scripts["study_report"].read_study(output)
    text = scripts["study_report"].tables_of(trained)
    assert text.count("in-domain") == text.count("sni_3_6") > 0
    assert "Optimizer steps: 10; seeds a method: 2." in text
    assert "without growing subsets" in text
    fewer = [one for one in trained if (one.method, one.seed) != ("forward_kl, none", 2)]
    table = scripts["study_report"].tables_of(fewer).split("\n\n### ")[0]
    assert "seeds a method: 1 or 2." in table
    [row] = [line for line in table.splitlines() if line.startswith("| in-domain | CE |")]
    assert row.count("(one seed)") == row.count("(2 seeds)") == 1


def test_the_answers_of_a_teacher_move_no_end_of_another_method(scripts, study):
    output, setup = study
    data = scripts["study_training"].Data(output, setup)
    before = data.encoder.end_ids
    data.own_encoder().stop_also_at({5})
    assert data.encoder.end_ids == before
    assert data.own_encoder().end_ids == before
    assert data.own_encoder().longest_prompt == data.encoder.longest_prompt > 0


def test_without_growing_subsets_stages_are_as_long_and_draw_from_all_samples_evenly(scripts):
    curriculum = baby_steps(np.arange(16), np.zeros(16), stages=4)
    growing = Schedule(curriculum, dict.fromkeys(range(16), 10), BatchSize(4), epochs=1)
    whole = scripts["study_training"].all_from_the_start(growing)
    assert [whole.steps(stage) for stage in range(4)] == [growing.steps(stage) for stage in range(4)] == [1, 2, 3, 4]
    drawn = [index for step in range(10) for index in whole.batch(step, 0)]
    assert {*np.bincount(drawn, minlength=16)} == {2, 3}
    assert [whole.setting(whole.place(step)) for step in range(10)] == [
        growing.setting(growing.place(step)) for step in range(10)
    ]


def test_trainings_that_the_study_compares_differ_and_each_is_trained_once(scripts):
    cells = scripts["study"].cells([*scripts["study_cells"].PARTS], [1], None)
    made = [(json.dumps(dict(one.options), sort_keys=True), one.passes, one.whole, one.teacher) for one, _ in cells]
    assert len({*made}) == len(made)


def test_passes_that_no_number_of_passes_a_stage_makes_are_refused(scripts, study, tmp_path):
    other = scripts["study"].Setup(**(vars(study[1]) | {"passes": 3.0}))
    with pytest.raises(SystemExit, match=r"--passes 3: four stages of n passes each are 2\.5 n over all"):
        scripts["study"].check_setup(tmp_path, other)


def test_a_folder_of_another_study_is_refused(scripts, study):
    output, setup = study
    other = scripts["study"].Setup(**(vars(setup) | {"passes": 5.0}))
    with pytest.raises(SystemExit, match=r"holds another study \(passes: was 2.5, now 5.0\): give another --output"):
        scripts["study"].check_setup(output, other)


def test_the_report_of_a_study_without_results_says_what_to_run(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study_report.py", str(tmp_path)])
    (tmp_path / "settings.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no training that is done"):
        scripts["study_report"].main()


def test_the_tables_take_their_place_in_a_page_and_nothing_else_moves(scripts, study, tmp_path, monkeypatch):
    report, page = scripts["study_report"], tmp_path / "page.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["study_report.py", str(study[0]), "--page", str(page)])
    report.main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nbelow\n")
    assert "old" not in text


def test_the_random_order_of_the_main_part_is_the_curriculum_without_its_order(scripts):
    report = scripts["study_report"]

    def trained(method, part, score):
        table = {"rouge_l": np.full(8, score), "cross_entropy": np.full(8, score), "tokens": np.full(8, 3)}
        return report.Trained(method, part, 1, 10, 1.0, {"in-domain": table})

    made = [trained("forward_kl, pocl", "main", 2.0), trained("without growing subsets", "parts", 3.0)]
    made.append(trained(scripts["study_cells"].WITHOUT_ORDER, "main", 4.0))
    rows = [line for line in report.tables_of(made).splitlines() if "| without " in line]
    assert len(rows) == 4  # two scores of each
    assert sum("without the order | 4.0 (one seed)" in row and "+2.0" in row for row in rows) == 1


def test_prompts_are_scored_that_are_longer_than_those_trained_on(scripts, study):
    output, setup = study
    data = scripts["study_training"].Data(output, scripts["study"].Setup(**(vars(setup) | {"max_prompt_length": 25})))
    longest = {name: max(len(one.prompt_ids) for one in made.encoded) for name, made in data.sets.items()}
    assert max(len(one.prompt_ids) for one in data.train.encoded) <= 25 < min(longest.values())


def test_holms_p_values_are_those_of_an_example(scripts):
    """Holm 1979: the smallest times their number, each at least the one before."""
    assert scripts["study_report"].holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
