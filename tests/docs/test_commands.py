"""Every `fastdit` command that a page shows is one that is there, with its options, and stacks that can be read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fastdit import InvalidConfig
from fastdit.bench.grammar import parse_stack
from fastdit.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *ROOT.glob("adapters/*/*.md"),
]

#: What a third party's package would add, so that no stack of it can be read here.
_OTHERS = ("LatentDrift",)


def commands(page: Path) -> Iterator[list[str]]:
    """Give the words of each command in a block of code, fenced or indented."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```(?:bash|text|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(re.findall(r"^    (fastdit .*)$", text, re.MULTILINE))
    for line in re.findall(r"^(?:fastdit|python|pip) .*$", f"{fenced}\n{indented}", re.MULTILINE):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            if words[:1] == ["fastdit"]:
                yield words[1:]
            words = []


SHOWN = [pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}") for page in PAGES for words in commands(page)]


def check(words: list[str]) -> None:
    """Raise for a command, an option or a stack that is not there."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word, value in zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            assert word.partition("=")[0] in options, word
        if word in ("--stack", "--part", "--engine") and not value.startswith(_OTHERS):
            parse_stack(value)


@pytest.mark.rows(100)
@pytest.mark.parametrize("words", SHOWN)
def test_what_a_page_shows_can_be_called(words: list[str]) -> None:
    check(words)


def test_pages_show_commands_and_wrong_ones_are_found() -> None:
    assert len(SHOWN) > 20
    with pytest.raises(KeyError, match="benhc"):
        check(["benhc"])
    with pytest.raises(AssertionError, match="--stak"):
        check(["bench", "mini", "--stak", "RALU"])
    with pytest.raises(InvalidConfig, match="TeaCash"):
        check(["bench", "mini", "--stack", "TeaCash"])
