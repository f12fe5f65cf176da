"""What the documentation shows of the classes and of the committed results is written into its pages from here.

A page holds a place for each such block, and its writer is called with the words that follow its name there:

    <!-- measured TeaCache: written by benchmarks/report.py -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import advice
import promises
import tables

ROOT = Path(__file__).parents[1]

#: What writes a block, by the first word of its place.
WRITERS: dict[str, Callable[..., str]] = {
    "levels": tables.levels,
    "accelerators": tables.table,
    "accelerator": tables.described,
    "parts": tables.parts,
    "measured": advice.measured,
    "numbers": advice.numbers,
    "purposes": advice.purposes,
    "presets": advice.presets,
    "caches": advice.caches,
    "engines": advice.engines,
    "pictures": advice.pictures,
    "kept": promises.kept,
}

_PLACE = re.compile(r"(<!-- (\w+(?: [\w/]+)*): written by benchmarks/report\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that has such a place."""
    found = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [page for page in found if _PLACE.search(page.read_text(encoding="utf-8"))]


def written(text: str) -> str:
    """A page with its blocks written anew. Raises `KeyError` where a place names no writer."""

    def block(place: re.Match[str]) -> str:
        begin, words, end = place.groups()
        name, *arguments = words.split()
        return f"{begin}\n{WRITERS[name](*arguments)}\n\n{end}"

    return _PLACE.sub(block, text)


def write() -> None:
    """Write every block into its page."""
    for page in pages():
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
