"""The page of a comparison is one file that loads nothing, with the curves of all runs."""

import html
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from tiny_compared import make_run

from pocl_fast.reports.compared_runs import Curve
from pocl_fast.reports.comparison import compare_runs
from pocl_fast.reports.comparison_page import COLOURS, mean_curve, page_of, style_of

FEW = 300
NASTY = '<script>alert("1")</script> & $x_1$ \\frac {{ 7*7 }}'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ours = [make_run(folder / f"a{seed}", seed=seed) for seed in (1, 2, 3)]
    return page_of(compare_runs({NASTY: ours, "flat": [make_run(folder / "b", stages=2)]}, resamples=FEW))


def pictures(page):
    return [ET.fromstring(svg) for svg in re.findall(r"<figure.*?(<svg.*?</svg>)</figure>", page, flags=re.DOTALL)]


def lines_of(picture):
    """The width of each line that has one of the methods' colours, with that colour."""
    styles = [path.get("style") or "" for path in picture.iter("{http://www.w3.org/2000/svg}path")]
    found = [re.search(r"stroke: (#\w{6}).*?stroke-width: ([\d.]+)", style) for style in styles]
    return [(one[1], float(one[2])) for one in found if one and one[1] in COLOURS and "fill: none" in one.string]


def test_the_page_loads_nothing(page):
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.findall(r"https?://|@import|<script|<link|<iframe|url\((?!#)|\bsrc=", without_namespaces)
    assert set(re.findall(r'href="([^"])', page)) <= {"#"}


def test_names_are_text(page):
    assert html.escape(NASTY, quote=False).replace('"', "&#34;") in page
    assert "<script" not in page
    assert "49" not in re.findall(r"<li>(.*?)</li>", page, flags=re.DOTALL)[0].replace(NASTY, "")[-12:]


def test_runs_are_thin_lines_and_means_bold_ones_in_a_colour_a_method(page):
    drawn = pictures(page)
    assert len(drawn) == 2
    for picture in drawn:
        lines = lines_of(picture)
        thin = [colour for colour, width in lines if width < 1]
        bold = [colour for colour, width in lines if width > 1]
        assert thin == [COLOURS[0]] * 3
        assert bold == [COLOURS[0], COLOURS[1]]
    for colour in COLOURS[:2]:
        assert f'stroke="{colour}"' in page.split("</ul>")[0]  # the legend


def test_the_legend_lights_up_the_curves_of_a_method(page):
    for picture in pictures(page):
        classes = [group.get("class") for group in picture.iter("{http://www.w3.org/2000/svg}g") if group.get("class")]
        assert classes == ["curve method-0"] * 4 + ["curve method-1"]
    assert ":nth-child(2):hover) ~ .curves .curve:not(.method-1)" in page


def test_pictures_have_the_pages_colours_and_share_no_names(page):
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(names)


def test_all_tables_and_notes_are_on_the_page(page):
    for text in (
        "Methods",
        "Data sets",
        "ROUGE-L of sampled answers",
        "Differences of cross-entropy",
        "95 % interval over",
    ):
        assert text in page
    assert "Thin lines are runs, one a training seed" in page


def test_without_logs_there_are_no_curves_and_that_is_said(tmp_path):
    runs = [make_run(tmp_path / "a", steps=None), make_run(tmp_path / "b", steps=None, stages=2)]
    text = page_of(compare_runs(runs, resamples=FEW))
    assert "there are no curves" in text
    assert "<figure" not in text
    with_one = page_of(compare_runs([runs[0], make_run(tmp_path / "c", stages=3)], resamples=FEW))
    assert "1 of the runs logged no such scores." in with_one


def test_a_mean_curve_is_over_the_steps_that_all_runs_reach():
    """The second run was evaluated at other steps, and is read between them."""
    first = Curve(np.array([0.0, 10, 20, 30]), np.array([0.0, 10, 20, 30]))
    second = Curve(np.array([5.0, 15, 25]), np.array([0.0, 0, 10]))
    mean = mean_curve([first, second])
    assert mean.steps.tolist() == [5, 10, 15, 20, 25]
    assert mean.values.tolist() == [2.5, 5, 7.5, 12.5, 17.5]
    assert mean_curve([]).steps.size == 0


def test_as_many_methods_as_a_study_has_are_told_apart():
    assert len({style_of(place) for place in range(32)}) == 32
