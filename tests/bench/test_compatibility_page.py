"""docs/compatibility.md is as its results are, and cells of it come out here as they did there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import compatibility
from fastdit import load_mini
from fastdit.accelerator import Level
from fastdit.bench.grammar import parse_stack, stack_text
from fastdit.bench.matrix import Cell, Matrix, MatrixRun

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

ROOT = Path(__file__).parents[2]
MATRICES = {
    name: Matrix.from_json(json.loads((ROOT / compatibility.results_of(name)).read_text(encoding="utf-8")))
    for name in compatibility.PIPELINES
}

#: Of a pipeline's cells, every so many are run again.
EVERY = 9

#: Parts of adapters, which are packages of their own.
ADAPTERS = ("OpenVINO", "Quantize", "TensorRT", "XFormers")

#: Parts whose cells compile for long; other tests run these.
COMPILED = ("AOT", "Compile", "Attention(backend='flex')")


@lru_cache(maxsize=1)
def pipeline(name: str) -> Any:
    made = load_mini("sd3" if name.endswith("sd3") else "flux")
    made.set_progress_bar_config(disable=True)
    return made


def stack_of(cell: Cell) -> list[Any]:
    return [part for text in cell.parts for part in parse_stack(text)]


def own_parts(matrix: Matrix) -> list[str]:
    return [part for part in matrix.parts if not part.startswith(ADAPTERS)]


def sampled() -> Iterator[ParameterSet]:
    for name, matrix in MATRICES.items():
        slow = (*ADAPTERS, *COMPILED)
        here = [cell for cell in matrix.cells.values() if not any(part.startswith(slow) for part in cell.parts)]
        for cell in here[::EVERY]:
            yield pytest.param(name, cell, id=f"{name}-{'+'.join(part.partition('(')[0] for part in cell.parts)}")


@pytest.mark.rows(6)
@pytest.mark.parametrize(("name", "cell"), list(sampled()))
def test_a_cell_comes_out_as_the_page_has_it(name: str, cell: Cell, tmp_path: Path) -> None:
    made = MatrixRun(pipeline(name), compatibility.CALL, tmp_path, rounds=1, name=name).cell(stack_of(cell))
    assert made.sound and cell.sound
    assert (made.status, made.told, made.fired) == (cell.status, cell.told, cell.fired)


@pytest.mark.parametrize("name", list(compatibility.PIPELINES))
def test_every_level_is_on_the_page_and_every_pair_was_run(name: str) -> None:
    matrix = MATRICES[name]
    levels = {part.level for text in own_parts(matrix) for part in parse_stack(text)}
    assert levels >= {Level.SCHEDULE, Level.STEP_CACHE, Level.TOKEN_CACHE, Level.ATTENTION, Level.ENGINE}
    count = len(matrix.parts)
    assert len(matrix.cells) == count + count * (count - 1) // 2
    assert [cell.parts for cell in matrix.cells.values() if not cell.sound] == []


def test_the_page_is_what_its_results_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (ROOT / compatibility.PAGE).read_text(encoding="utf-8") == compatibility.page()


def test_every_part_is_said_as_stacks_are() -> None:
    for matrix in MATRICES.values():
        assert [stack_text(parse_stack(part)) for part in own_parts(matrix)] == own_parts(matrix)
