"""The report stands alone, escapes what it is given, and shows every configuration."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

from fastdit.measure.charts import Point, speed_quality
from fastdit.measure.report import (
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
        self.found += [tag] * (tag in ("script", "link", "iframe", "object"))


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


def test_results_without_pictures_and_judge_still_make_a_report(tmp_path: Path) -> None:
    results = make_results()
    assert "Pictures" not in render_report(results, tmp_path)


def test_the_summary_names_the_fastest_stack_and_its_rival() -> None:
    text = " ".join(summary(make_results()))
    assert "RALU 4x" in text and "50 steps" in text and "11 steps" in text


def test_a_timeline_has_a_band_a_stage_and_a_cell_a_step() -> None:
    lines = {line.name: line for line in timelines(make_results().configurations)}
    assert [len(band.cells) for band in lines["RALU 4x"].bands] == [5, 6, 7]
    assert lines["RALU 4x"].bands[0].cells[0].height == 0.25
    assert {cell.action for cell in lines["TeaCache"].bands[0].cells} == {"computed", "reused"}
    assert lines["28 steps"].share == 28 / 50


def test_the_plot_is_well_formed_even_for_equal_points_with_odd_names() -> None:
    interval = Interval(1.0, 1.0, 1.0)
    points = [Point("a <b> & c", interval, interval, plain=True), Point("d", interval, interval, plain=False)]
    root = ElementTree.fromstring(speed_quality(points, quality="judge score"))
    assert [text.text for text in root.iter("text")].count("a <b> & c") == 1
