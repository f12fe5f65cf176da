"""Every Python block of README and documentation runs, page by page, on the embedded or tiny models.

A block that can't says why in its first line, `# Not run here: ...`; its imports run and its names are known. A block
under a file's name is that file of the sample package, which has tests of its own.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import CodeType

import pytest
import torch

import fastdit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("accelerators/*.md"))]

_BLOCK = re.compile(r"^(?P<file>`\S+`:\n\n)?```(?P<kind>python|pycon)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"# Not run here: .{10,}\n")


@dataclass(frozen=True)
class Block:
    """A block of code, with the page's line that it follows."""

    page: Path
    line: int
    kind: str
    code: str
    of_a_file: bool

    @property
    def runs(self) -> bool:
        return not self.of_a_file and _NOT_RUN.match(self.code) is None

    def compiled(self) -> CodeType:
        return compile("\n" * self.line + self.code, str(self.page), "exec")


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield Block(page, line, found["kind"], found["code"], found["file"] is not None)


def unknown_names(code: str, known: set[str]) -> set[str]:
    """The names that code reads and that neither it nor anything before it binds."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    read, bound = ({node.id for node in names if isinstance(node.ctx, kind)} for kind in (ast.Load, ast.Store))
    return read - bound - known - set(dir(builtins))


def imports(code: str) -> str:
    nodes = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(map(ast.unparse, nodes))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": page.stem}
    known: set[str] = set()
    public = {name: getattr(fastdit, name) for name in dir(fastdit)} | {"torch": torch}
    for block in blocks(page):
        if block.kind == "pycon":
            example = doctest.DocTestParser().get_doctest(block.code, public, page.stem, str(page), block.line)
            assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
        elif block.runs:
            exec(block.compiled(), space)
        elif not block.of_a_file:
            block.compiled()
            exec(imports(block.code), space)
            assert unknown_names(block.code, known | set(space)) == set()
            known |= {node.id for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Name)}


def test_most_blocks_run() -> None:
    found = [block for page in PAGES for block in blocks(page) if not block.of_a_file]
    assert sum(block.runs for block in found) > 0.75 * len(found)


def test_a_name_that_nothing_binds_is_found() -> None:
    assert unknown_names("fast = accelerate(pipe)\nprint(fast)", {"accelerate"}) == {"pipe"}


def cells(kind: str) -> list[str]:
    notebook = json.loads((ROOT / "docs" / "examples" / "first-steps.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_names_what_is_there_and_keeps_no_outputs() -> None:
    space: dict[str, object] = {}
    code = "\n".join(cells("code"))
    exec(imports(code), space)
    assert unknown_names(code, set(space) | {"picture", "pipeline", "steps"}) == set()  # a function and its own
    notebook = json.loads((ROOT / "docs" / "examples" / "first-steps.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.exhaustive
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for cell in cells("code"):
        exec(compile(cell, "first-steps.ipynb", "exec"), space)
    assert (tmp_path / "stack" / "stack.json").exists()


def test_the_classes_to_write_a_method_from_are_where_the_page_says() -> None:
    page = (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) >= 8
    for row in rows:
        classes, modules = (re.sub(r"[`|]", "", cell).split(";") for cell in row[1:3])
        for names, module in zip(classes, modules, strict=True):
            for name in names.split(","):
                assert hasattr(import_module(module.strip()), name.strip()), (module, name)


def test_what_the_readme_links_to_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r'(?:\]\(|src(?:set)?=")([^)#"]+)', text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_reference_names_everything_that_is_public() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [
        name for name in fastdit._HOMES if not re.search(rf"^::: fastdit\.[\w.]+\.{name}$", text, re.MULTILINE)
    ] == []
