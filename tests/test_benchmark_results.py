"""What is kept of a benchmark run, and the page that is made of it. All figures here are made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "results.py"
MACHINE = {
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "liger-kernel": "missing",
    "commit": "abc1234",
    "date": "2026-12-01T10:00+00:00",
}
NO_GPU = "No GPU has been measured yet"


def loss_row(objective, ours, **sides):
    return {"objective": objective, "N": 8192, "V": 151936, "floor_ms": 1.74, "sides": {"ours": ours, **sides}}


LOSS = {
    "machine": MACHINE | {"copy_GB_a_second": 4300.0},
    "rows": [
        loss_row("forward_kl+CE", {"ms": 3.48, "gradient_error": 2e-3}, eager={"ms": 34.8, "gradient_error": 2e-3}),
        loss_row("jsd+CE", {"ms": 6.0}, eager={"wrong": "loss off by 3.0e-01, gradient by 1.0e+00"}),
    ],
    "dropped": ["tvd+CE 4096 x 32000"],
    "later_calls": [
        {"machine": MACHINE, "rows": [loss_row("jsd+CE", {"ms": 5.0}, compiled={"ms": 20.0})], "dropped": []}
    ],
}
RUN = [
    {"name": "loss", "seconds": 120.5, "status": 0, "says": ""},
    {"name": "sweep", "seconds": 41.0, "status": 1, "says": "RuntimeError: no such tile | really"},
    {"name": "training", "seconds": 60, "status": 124, "says": ""},
    {"name": "counters", "seconds": 0, "status": "dropped", "says": "no time left"},
]


def results_py(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def folder_of_run(path, machine=MACHINE, run=RUN, **results):
    """An OUT folder as a run leaves it."""
    path.mkdir()
    contents = {"run": {"machine": machine, "sections": run}} | results
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (path / "gpu.log").write_text("log", encoding="utf-8")
    return path


def kept(tmp_path, name, **options):
    """Keeps a made-up run; the JSON that came of it."""
    done = results_py("keep", folder_of_run(tmp_path / name, **options), "--results", tmp_path / "kept", "--name", name)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "kept" / f"{name}.json").read_text(encoding="utf-8"))


def page(tmp_path):
    done = results_py("docs", "--results", tmp_path / "kept", "--page", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    return (tmp_path / "page.md").read_text(encoding="utf-8")


def unwrapped(text):
    """In one line, for sentences may be broken anywhere."""
    return " ".join(text.split())


def test_the_page_in_docs_is_what_the_kept_results_give():
    done = results_py("docs", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_was_edited_fails_the_check(tmp_path):
    kept(tmp_path, "first", loss=LOSS)
    page(tmp_path)
    check = ("docs", "--check", "--results", tmp_path / "kept", "--page", tmp_path / "page.md")
    assert results_py(*check).returncode == 0
    path = tmp_path / "page.md"
    path.write_text(path.read_text(encoding="utf-8").replace("3.48", "2.48"), encoding="utf-8")
    done = results_py(*check)
    assert done.returncode == 1
    assert "3.48" in done.stdout


# ---- keeping ----


def test_the_results_of_a_run_become_one_file_named_by_date_and_device(tmp_path):
    folder = folder_of_run(tmp_path / "out", loss=LOSS, other={"figure": 1})
    done = results_py("keep", folder, "--results", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "kept").iterdir()
    assert path.name == "2026-12-01-nvidia-h200.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["machine"] == MACHINE
    assert result["run"] == RUN
    assert list(result["sections"]) == ["loss"]
    assert result["sections"]["loss"]["rows"] == LOSS["rows"]
    assert result["sections"]["loss"]["machine"] == {"copy_GB_a_second": 4300.0}
    assert "missing: smoke, sweep, training, counters, linear" in done.stdout
    assert "left out, no results: gpu.log, other.json" in done.stdout


def test_a_kept_result_is_not_overwritten(tmp_path):
    first = folder_of_run(tmp_path / "first", loss=LOSS)
    second = folder_of_run(tmp_path / "second", loss=LOSS | {"rows": []})
    assert results_py("keep", first, "--results", tmp_path / "kept").returncode == 0
    (path,) = (tmp_path / "kept").iterdir()
    before = path.read_bytes()
    done = results_py("keep", second, "--results", tmp_path / "kept")
    assert done.returncode == 1
    assert "not overwritten" in done.stderr
    assert path.read_bytes() == before
    assert results_py("keep", second, "--results", tmp_path / "kept", "--name", "second").returncode == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("results", "without", "says"),
    [
        ({"loss": LOSS}, "run", "has no run.json"),
        ({}, None, "no results but run.json"),
        ({"loss": LOSS | {"machine": MACHINE | {"commit": "def5678"}}}, None, "not the results of one run"),
    ],
)
def test_what_is_not_the_folder_of_one_run_is_refused(tmp_path, results, without, says):
    folder = folder_of_run(tmp_path / "out", **results)
    if without:
        (folder / f"{without}.json").unlink()
    done = results_py("keep", folder, "--results", tmp_path / "kept")
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "kept").exists()


# ---- the page ----


def test_sections_that_failed_or_are_missing_are_named(tmp_path):
    kept(tmp_path, "first", loss=LOSS)
    text = page(tmp_path)
    assert "| sweep | **failed**, exit status 1 | 41.0 | RuntimeError: no such tile \\| really |" in text
    assert "| training | **out of time** |" in text
    assert "| counters | **dropped** | 0 | no time left |" in text
    assert "Without a result: smoke, sweep, training, counters, linear." in text


def test_times_ratios_and_the_share_of_the_floor_are_shown_and_a_wrong_side_is_too(tmp_path):
    kept(tmp_path, "first", loss=LOSS)
    text = page(tmp_path)
    assert "| forward_kl+CE 8192 x 151936 | 50 % | 3.48 | 34.80 (10.0x) |" in text
    assert "| jsd+CE 8192 x 151936 | 29 % | 6.00 | wrong |" in text
    assert "eager, wrong: loss off by 3.0e-01, gradient by 1.0e+00 (jsd+CE 8192 x 151936)" in unwrapped(text)
    assert "whole rows dropped, no time left (tvd+CE 4096 x 32000)" in unwrapped(text)


def test_ratios_of_a_later_call_are_over_ours_of_that_call(tmp_path):
    kept(tmp_path, "first", loss=LOSS)
    _, later = page(tmp_path).split("measured in another call")
    assert "| jsd+CE 8192 x 151936 | 35 % | 5.00 | 20.00 (4.0x) |" in later


def test_smoke_checks_that_failed_are_named(tmp_path):
    checks = [
        {"check": "bf16", "status": "passed"},
        {"check": "fp32", "status": "failed", "reason": "gradient is off"},
        {"check": "fp16", "status": "absent", "reason": "not here"},
    ]
    kept(tmp_path, "first", smoke={"jobs": [{"job": "jsd", "seconds": 9.0, "checks": checks}]})
    text = page(tmp_path)
    assert "1 checks passed, 1 failed, 1 absent" in unwrapped(text)
    assert "| jsd | 1 | 1 | 1 | 9.00 |" in text
    assert "- **failed**: jsd, fp32: gradient is off" in text
    assert "- absent: jsd, fp16: not here" in text


def test_training_sides_without_figures_are_named(tmp_path):
    sides = {
        "ours, first epoch": {"seconds_a_step": 0.1, "mfu": 0.4, "peak_bytes": 2**30},
        "plain": {"seconds_a_step": 0.25, "mfu": 0.2, "pieces": 2},
        "liger": {"failed": "OutOfMemoryError: too much"},
    }
    row = {"batch": 16, "tokens_a_step": 4000, "supervised_a_step": 2000, "padding": 0.3, "sides": sides}
    kept(tmp_path, "first", training={"shapes": "tiny", "rows": [row | {"failure": "ours failed"}]})
    text = page(tmp_path)
    assert "| ours, first epoch | 100 | 1.00x |" in text
    assert "| plain | 250 | 2.50x |" in text
    assert "| liger | failed |" in text
    assert "- **ours failed**" in text
    assert "- liger, failed: OutOfMemoryError: too much" in text
    assert "- plain: a batch does not fit the memory whole, in 2 pieces" in text


def test_a_table_in_the_general_form_and_a_result_of_no_known_form_are_shown(tmp_path):
    table = {"title": "Attention", "claim": "It is fast.", "columns": ["side", "ms"], "rows": [["ours", 1.234]]}
    sweep = {"machine": MACHINE, "rows": [{"warps": 8, "ms": 3.21}, {"warps": 16, "ms": 2.5}], "tried": 2}
    result = kept(tmp_path, "first", packed_attention=table | {"note": "a\nnote"}, sweep=sweep)
    assert list(result["sections"]) == ["sweep", "packed_attention"]
    text = page(tmp_path)
    assert "#### Attention\n\nIt is fast.\n\n| side | ms |\n| --- | ---: |\n| ours | 1.23 |\n\na note" in text
    assert "| 8 | 3.21 |\n| 16 | 2.50 |" in text
    assert "tried: 2" in text


def test_without_a_gpu_result_the_page_says_so(tmp_path):
    kept(tmp_path, "cpu", machine=MACHINE | {"device": "CPU, some, 2 threads"}, loss=LOSS | {"machine": {}})
    assert NO_GPU in page(tmp_path)
    kept(tmp_path, "gpu", loss=LOSS)
    assert NO_GPU not in page(tmp_path)


def test_an_empty_folder_of_results_gives_a_page(tmp_path):
    (tmp_path / "kept").mkdir()
    assert NO_GPU in page(tmp_path)


def test_of_a_device_the_newest_result_is_shown_and_older_ones_in_a_line_each(tmp_path):
    table = {"title": "Attention", "columns": ["side", "ms"], "rows": [["ours", 1.234]]}
    older = MACHINE | {"commit": "old9999", "date": "2026-11-01T10:00+00:00"}
    faster = LOSS | {"machine": MACHINE, "rows": [loss_row("forward_kl+CE", {"ms": 2.0})], "later_calls": []}
    kept(tmp_path, "older", machine=older, loss=LOSS | {"machine": older}, packed_attention=table)
    kept(tmp_path, "newer", loss=faster)
    text = page(tmp_path)
    assert text.index("commit abc1234") < text.index("commit old9999")
    assert "| forward_kl+CE 8192 x 151936 | 87 % | 2.00 |" in text
    assert "| 3.48 |" not in text
    assert "#### Attention" in text  # which the newest does not have
    line = "- 2026-11-01, commit old9999, `older.json`: loss (forward_kl+CE 8192 x 151936: 3.48 ms, 50 % of the floor)"
    assert line in unwrapped(text)


def test_predictions_are_apart_and_what_was_measured_since_is_beside_them(tmp_path):
    table = {"title": "A model", "columns": ["objective", "predicted ms"], "rows": [["forward_kl+CE", 3.2]]}
    model = {"N": 8192, "V": 151936, "predicted_ms": {"forward_kl+CE": 3.2}, "tables": [table]}
    (tmp_path / "kept").mkdir()
    modelled = {"modelled": True, "machine": MACHINE, "sections": {"model": model}}
    (tmp_path / "kept" / "modelled.json").write_text(json.dumps(modelled), encoding="utf-8")
    text = page(tmp_path)
    assert NO_GPU in text
    assert text.index("## Modelled") < text.index("#### A model")
    assert "No measurement has been set beside this model yet." in text
    kept(tmp_path, "first", loss=LOSS)
    text = page(tmp_path)
    assert "| forward_kl+CE | 3.20 | 3.48 | 1.09x |" in text
    assert "No measurement has been set" not in text


# ---- what writes the results ----


def test_a_later_call_of_the_loss_is_added_to_the_first_ones_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OUT", str(tmp_path))
    from loss_gpu import started

    call = {"machine": MACHINE, "rows": [], "dropped": []}
    assert started(call, append=False) is call
    alone = started(call, append=True)
    assert alone["rows"] == []
    assert alone["later_calls"] == [call]
    (tmp_path / "loss.json").write_text(json.dumps(LOSS), encoding="utf-8")
    both = started(call, append=True)
    assert both["rows"] == LOSS["rows"]
    assert both["later_calls"] == [*LOSS["later_calls"], call]
    with pytest.raises(SystemExit, match="not two calls of one run"):
        started(call | {"machine": MACHINE | {"commit": "def5678"}}, append=True)


SASS = """
.L_x_1:
        /*0000*/                   MUFU.EX2 R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/                   FADD R1, R1, R3 ;
.L_x_2:
        /*0040*/                   MUFU.LG2 R5, R1 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_the_model_counts_the_shortest_path_with_the_exponentials_of_the_formula():
    """In a process of its own, for the model turns Triton's interpreter off."""
    pytest.importorskip("triton")
    code = "import json, sys; from model_gpu import *; (loop,) = loops_of(sys.argv[1])\n"
    code += "print(json.dumps([hot_path(loop, exponentials) for exponentials in (1, 2, 3)]))"
    done = subprocess.run([sys.executable, "-c", code, SASS], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[4, 2], [6, 3], None]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ({"loss": {}}, "loss.json is damaged, or of another version: KeyError 'rows'"),
        ({"linear": {"tables": [{"title": "t"}]}}, "linear.json is damaged"),
        ({"loss": LOSS | {"machine": None}}, "its machine is no record, but None"),
    ],
)
def test_a_damaged_result_is_named_and_not_kept_where_it_would_stop_the_page(tmp_path, results, says):
    folder = folder_of_run(tmp_path / "run", **results)
    done = results_py("keep", folder, "--results", tmp_path / "kept")
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "kept").exists()


def test_a_name_stays_within_the_folder_of_results(tmp_path):
    folder = folder_of_run(tmp_path / "run", loss=LOSS)
    done = results_py("keep", folder, "--results", tmp_path / "kept", "--name", "../elsewhere")
    assert done.returncode == 1
    assert "--name ../elsewhere: give small letters" in done.stderr
