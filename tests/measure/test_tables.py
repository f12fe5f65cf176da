"""What the pages show of the classes and of the committed results is what the generator writes."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastdit
import pages
import tables
from fastdit.accelerator import Accelerator

ACCELERATORS = pages.ROOT / "docs" / "accelerators"


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_a_page_holds_what_the_generator_writes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == pages.written(text), "run python benchmarks/report.py"


def test_every_public_accelerator_and_part_has_a_row_that_says_what_it_does() -> None:
    rows = {row.split("`")[1]: row.split(" | ") for row in tables.table().splitlines()[2:]}
    for name in dir(fastdit):
        cls = getattr(fastdit, name)
        if isinstance(cls, type) and issubclass(cls, (Accelerator, *tables.PARTS.values())):
            assert len(rows[name][2]) > 20


@pytest.mark.parametrize("cls", tables.public(Accelerator), ids=lambda cls: cls.__name__)
def test_every_public_accelerator_has_a_page_of_its_own(cls: type[Accelerator]) -> None:
    text = (ACCELERATORS / f"{cls.__name__.lower()}.md").read_text(encoding="utf-8")
    assert f"<!-- accelerator {cls.__name__}: written by" in text
    assert cls.level.value in tables.described(cls.__name__)


def test_a_docstring_becomes_tables_formulas_and_an_example() -> None:
    text = tables.described("TeaCache")
    assert "| `threshold` | " in text  # a field, with its default
    assert "| `InvalidConfig` | " in text
    assert "```text\nd_t = mean|m_t - m_(t-1)|" in text
    assert "```pycon\n>>> TeaCache(0.4" in text
    assert "https://arxiv.org/abs/2411.19108" in text


def test_a_place_that_nothing_writes_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        pages.written("<!-- nonsense: written by benchmarks/report.py -->\n<!-- end -->")
