"""The report stands alone, escapes what it is given, and shows every configuration."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdit.measure import report
from fastdit.measure.charts import BOTTOM, LEFT, RIGHT, TOP, Point, Waterfall, speed_quality
from fastdit.measure.report import (
    DETAILED,
    detailed,
    render_report,
    summary,
    timelines,
    write_report,
)
from fastdit.measure.statistics import Interval
from tests.measure.samples import make_results


class References(HTMLParser):
    """Collects everything that a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.found += [tag] * (tag in ("link", "iframe", "object"))


def test_the_report_loads_nothing_from_outside(tmp_path: Path) -> None:
    page = write_report(make_results(tmp_path), tmp_path).read_text(encoding="utf-8")
    references = References()
    references.feed(page)
    assert references.found and all(value.startswith("data:image/png;base64,") for value in references.found)
    assert not re.search(r"https?://|url\(|@import", page)


def test_the_report_shows_every_configuration_and_escapes_prompts(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    page = render_report(results, tmp_path)
    assert all(entry.name in page for entry in results.configurations)
    assert "a &lt;star&gt; &amp; a car" in page and "<star>" not in page


def test_every_picture_can_be_laid_over_the_full_run_s(tmp_path: Path) -> None:
    page = render_report(make_results(tmp_path), tmp_path)
    assert "Against the full run" in page and page.count("<option>") == 4 and 'data-row="50 steps"' in page
    assert 'const rows = ["50 steps"' in page


def test_a_waterfall_goes_from_the_plain_run_to_the_stack(tmp_path: Path) -> None:
    gains = [("Schedule", Interval(2.0, 1.9, 2.1), False), ("Cache", Interval(0.8, 0.7, 1.1), True)]
    fall = Waterfall.of("both", 10.0, gains)
    assert [bar.kind for bar in fall.bars] == ["plain", "gain", "dead", "stack"]
    assert [(bar.start, bar.width) for bar in fall.bars] == [(0, 100), (50, 50), (50, 12.5), (0, 62.5)]
    assert fall.bars[-1].told == "6.25 s" and "dead weight" in fall.bars[2].told
    page = render_report(make_results(), tmp_path, [fall])
    assert "What each part brought" in page and "left: 50.00%; width: 12.50%" in page


def test_a_thousand_rows_are_all_in_the_table_and_few_in_pictures(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    *some, last = results.configurations
    many = tuple(dataclasses.replace(last, name=f"stack {number}") for number in range(995))
    results = dataclasses.replace(results, configurations=(*some, last, *many))
    chosen = detailed(results)
    assert len(chosen) == DETAILED and chosen[0].name == results.baseline


def test_pictures_that_don_t_fit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_results(tmp_path)
    whole = render_report(results, tmp_path).count('src="data:')
    monkeypatch.setattr(report, "EMBEDDED", 5 * 2 * 13_000)
    assert 0 < render_report(results, tmp_path).count('src="data:') < whole


def test_results_without_pictures_and_judge_still_make_a_report(tmp_path: Path) -> None:
    results = make_results()
    assert "Pictures" not in render_report(results, tmp_path)


def test_the_summary_names_the_fastest_stack_and_its_rival() -> None:
    text = " ".join(summary(make_results()))
    assert "RALU 4x" in text and "50 steps" in text and "11 steps" in text


def test_the_summary_claims_nothing_that_is_too_noisy() -> None:
    results = make_results()
    accelerated = next(entry for entry in results.configurations if entry.stack is not None)
    noisy = dataclasses.replace(accelerated, seconds=(0.01, 9.0) * (len(accelerated.seconds) // 2))
    others = (entry for entry in results.configurations if entry.stack is None)
    told = summary(dataclasses.replace(results, configurations=(*others, noisy)))
    assert told[0] == f"How much faster {noisy.name} is than {results.baseline} was not shown: times are too noisy."


def test_a_name_breaks_where_a_word_begins_and_is_escaped() -> None:
    assert report._breakable("TaylorSeer <b>") == "Taylor<wbr>Seer &lt;b&gt;"


def test_a_timeline_has_a_band_a_stage_and_a_cell_a_step() -> None:
    lines = {line.name: line for line in timelines(make_results().configurations)}
    assert [len(band.cells) for band in lines["RALU 4x"].bands] == [5, 6, 7]
    assert lines["RALU 4x"].bands[0].cells[0].height == 0.25
    assert {cell.action for cell in lines["TeaCache"].bands[0].cells} == {"computed", "reused"}
    assert lines["28 steps"].share == 28 / 50


def test_the_plot_is_well_formed_even_for_odd_names(tmp_path: Path) -> None:
    results = make_results()
    odd = dataclasses.replace(results.configurations[-1], name="a <b> & c")
    results = dataclasses.replace(results, configurations=(*results.configurations[:-1], odd))
    page = render_report(results, tmp_path)
    svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    root = ElementTree.fromstring(svg)
    labels = [text.text for text in root.iter("text") if text.attrib["class"].startswith("label")]
    assert sorted(labels, key=str) == sorted(entry.name for entry in results.configurations)
    assert len(list(root.iter("circle"))) == len(labels)


def test_every_point_is_inside_the_frame_even_if_all_are_equal() -> None:
    interval = Interval(1.0, 1.0, 1.0)
    plot = speed_quality([Point("a", interval, interval, plain=True), Point("d", interval, interval, plain=False)])
    assert all(LEFT < mark.x < RIGHT and TOP < mark.y < BOTTOM for mark in plot.marks)
    assert len({mark.label for mark in plot.marks}) == 2
    assert plot.line == [(plot.marks[0].x, plot.marks[0].y)]


def test_faster_is_further_right_and_better_further_up() -> None:
    slow, fast = Interval(1.0, 0.9, 1.1), Interval(4.0, 3.9, 4.1)
    marks = speed_quality([Point("slow", slow, slow, plain=True), Point("fast", fast, fast, plain=False)]).marks
    one, other = (next(mark for mark in marks if mark.point.label == name) for name in ("slow", "fast"))
    assert one.left < one.x < one.right < other.left < other.x
    assert other.high < other.y < one.high < one.y < one.low
