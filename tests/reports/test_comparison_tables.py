"""Tables of a comparison say its figures, and survive any name in text, Markdown and LaTeX."""

import re

import pytest
from tiny_compared import make_run, make_scores

from pocl_fast.reports.comparison import compare_runs
from pocl_fast.reports.comparison_tables import Cell, Table, p_text, tables_of
from pocl_fast.reports.written_tables import as_latex, as_markdown, as_text, latex, markdown

FEW = 300
NASTY = r"50%_of{it} & $x$ | <b>*a*</b> [l](u) ~^\n # `c` " "\x1b[31m"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sets = {"dev": make_scores(20), "test_x": make_scores(20, better=1)}
    better = {"dev": make_scores(20, better=6, seed=2), "test_x": make_scores(20, better=7, seed=2)}
    return [make_run(folder / "a", sets=sets), make_run(folder / "b", sets=better, stages=2, steps=30)]


@pytest.fixture(scope="module")
def comparison(runs):
    return compare_runs(runs, resamples=FEW)


@pytest.fixture(scope="module")
def nasty(runs):
    return compare_runs({NASTY: runs[:1], "plain": runs[1:]}, resamples=FEW)


def titled(comparison, part, **options):
    return next(table for table in tables_of(comparison, **options) if part in table.title)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_a_table_of_scores_has_a_row_a_method_and_a_column_a_set(comparison):
    table = titled(comparison, "cross-entropy")
    assert table.heads == ("", "method", "test_x", "dev")
    assert [row[:2] for row in texts(table)] == [
        ["A", "stages 4"], ["B", "stages 2"], ["", "student before training"], ["", "teacher"],
    ]  # fmt: skip
    score = comparison.sets[1].scores["cross_entropy"][1]
    assert texts(table)[1][3] == f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]†*"
    assert table.rows[1][3].strong
    assert not table.rows[0][3].strong


def test_a_table_of_differences_has_a_row_a_pair(comparison):
    table = titled(comparison, "Differences of ROUGE-L")
    pair = comparison.sets[0].pairs["rouge_l"][0]
    assert table.heads == ("pair", "test_x", "p", "dev", "p")
    minus = f"{pair.difference:.2f} [{pair.low:.2f}, {pair.high:.2f}]".replace("-", "−")
    assert texts(table)[0][:3] == ["A − B", minus, p_text(pair.p)]
    assert pair.difference < 0


def test_the_budgets_stand_in_the_table_of_methods(comparison):
    assert texts(titled(comparison, "Methods")) == [
        ["A", "stages 4", "1", "20", "1.0"], ["B", "stages 2", "1", "30", "1.0"],
    ]  # fmt: skip


def test_a_set_that_chose_weights_is_marked(comparison):
    assert texts(titled(comparison, "Data sets")) == [
        ["test_x", "data/test_x.jsonl", "test", "20"],
        ["dev", "data/dev.jsonl", "dev, chose weights", "20"],
    ]


def test_of_many_pairs_those_that_differ_are_listed_and_all_are_counted(tmp_path):
    runs = [make_run(tmp_path / str(n), better=8.0 * (n == 0), seed=n, stages=n + 1, steps=None) for n in range(11)]
    comparison = compare_runs(runs)
    table = titled(comparison, "Differences of ROUGE-L")
    assert {row[0].split(" − ")[0] for row in texts(table)} == {"A"}
    assert table.note == f"{len(table.rows)} of 55 pairs: those with Holm's p < 0.05 on a set. The page has all."
    every = titled(comparison, "Differences of ROUGE-L", all_pairs=True)
    assert (len(every.rows), every.note) == (55, "")


@pytest.mark.parametrize(
    ("p", "text"), [(None, "-"), (1.0, "1.000"), (0.0316, "0.032"), (0.001, "0.001"), (0.0002, "<0.001")]
)
def test_small_p_values_are_bounded(p, text):
    assert p_text(p) == text


def test_text_has_at_most_100_columns_and_cuts_figures_that_belong_together_in_one_piece():
    heads = ("pair", *(head for n in range(6) for head in (f"set{n}", "p", "Holm's p")))
    row = (Cell("A − B"), *(Cell(text) for _ in range(6) for text in ("+1.00 [0.10, 2.00]", "0.010", "0.020")))
    text = as_text([Table("Differences", heads, (row,), 1, "", 3)], ["a note " * 30])
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("Differences") == 3
    parts = [line.split() for line in text.splitlines() if line.strip().startswith("pair")]
    assert parts == [
        ["pair", *(word for n in pair for word in (f"set{n}", "p", "Holm's", "p"))] for pair in ((0, 1), (2, 3), (4, 5))
    ]
    assert text.count("0.020") == 6


def test_a_long_name_goes_on_in_the_next_line():
    name = "forward_kl, curriculum none, learning rate 0.0001, temperature 1 2, alpha 0.3 0"
    lines = as_text([Table("T", ("", "method", "x"), ((Cell("A"), Cell(name), Cell("1.0")),), 2)], []).splitlines()
    assert (
        " ".join(part for line in lines[2:] for part in line.split())
        == f"A {name[:38].strip()} 1.0 {name[38:].strip()}"
    )


def test_text_obeys_no_control_characters(nasty):
    assert "\x1b" not in as_text(tables_of(nasty), nasty.notes)


def cells_of(line):
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_markdown_rows_have_as_many_cells_as_heads_whatever_a_method_is_called(nasty):
    tables = tables_of(nasty)
    blocks = [
        [line for line in block.splitlines() if line.startswith("|")]
        for block in as_markdown(tables, nasty.notes).split("### ")[1:]
    ]
    for table, lines in zip(tables, blocks, strict=True):
        assert [len(cells_of(line)) for line in lines] == [len(table.heads)] * (len(table.rows) + 2)
    assert markdown("a_b _c_ <i> 5*3 $x$ [l](u) a|b") == r"a_b \_c\_ &lt;i> 5\*3 \$x\$ [l]\(u) a\|b"


def test_markdown_and_latex_make_the_best_bold(comparison):
    best = next(cell.text for row in titled(comparison, "ROUGE-L of").rows for cell in row if cell.strong)
    assert f"| **{markdown(best)}** |" in as_markdown(tables_of(comparison), [])
    assert rf"\textbf{{{latex(best)}}}" in as_latex(tables_of(comparison), [])


def test_latex_rows_have_as_many_cells_as_columns_whatever_a_method_is_called(nasty):
    tables = tables_of(nasty)
    text = as_latex(tables, nasty.notes)
    for table, block in zip(tables, re.findall(r"\\begin\{table\}(.*?)\\end\{table\}", text, re.DOTALL), strict=True):
        assert len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", block)[1]) == len(table.heads)
        rows = [line for line in block.splitlines() if line.endswith(r" \\")]
        assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [len(table.heads)] * (len(table.rows) + 1)


def test_latex_escapes_all_that_has_a_meaning_there(nasty):
    assert latex("50%_of{it} & $x$ #") == r"50\%\_of\{it\} \& \$x\$ \#"
    assert latex(r"a\b~^<|>") == r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}$<$$|$$>$"
    assert latex("−1 [0, 1]†*") == r"$-$1 {[}0, 1{]}\textdagger{}{*}"
    text = as_latex(tables_of(nasty), nasty.notes)
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert [line for line in text.splitlines() if re.search(r"(?<!\\)%", line)] == ["% needs \\usepackage{booktabs}"]
