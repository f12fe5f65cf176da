"""The page on writing methods shows the sample package's files, as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = DOCS / "examples" / "fastdit-sample"
SHOWN = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", (DOCS / "writing-a-method.md").read_text(), re.M | re.S))
FILES = [PACKAGE / "pyproject.toml", PACKAGE / "tests" / "test_contracts.py", *PACKAGE.glob("src/*/*.py")]


def test_the_page_shows_every_file_of_the_package_as_it_is() -> None:
    assert {str(path.relative_to(PACKAGE)): path.read_text() for path in FILES} == SHOWN


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_entry_point_names_something_that_its_module_has() -> None:
    import tomllib

    groups = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(groups) == {"fastdit.accelerators", "fastdit.families"}
    for place in (place for group in groups.values() for place in group.values()):
        module, name = place.split(":")
        source = (PACKAGE / "src" / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^(class {name}\b|{name} = )", source, re.M), place


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", (DOCS / "writing-a-method.md").read_text()))
def test_what_the_page_links_to_is_there(link: str) -> None:
    assert (DOCS / link).exists()
