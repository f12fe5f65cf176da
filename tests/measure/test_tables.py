"""The documentation's tables of accelerators are what the classes say of themselves."""

from __future__ import annotations

import pytest

import fastdit
import tables
from fastdit.accelerator import Accelerator


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.path)
def test_a_page_holds_the_table_that_the_generator_writes(page: tables.Page) -> None:
    text = (tables.ROOT / page.path).read_text(encoding="utf-8")
    assert text == tables.with_table(text, page), "run python benchmarks/report.py"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.path)
def test_every_public_accelerator_has_a_row_that_says_what_it_does(page: tables.Page) -> None:
    rows = {row.split(" | ")[0]: row.split(" | ") for row in tables.table(page).splitlines()[2:]}
    for name in dir(fastdit):
        cls = getattr(fastdit, name)
        if isinstance(cls, type) and issubclass(cls, (Accelerator, *(tables.PARTS[part] for part in page.parts))):
            assert len(rows[f"| `{name}`"][2]) > 20


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="around the place"):
        tables.with_table("nothing", tables.PAGES[0])
