"""`fastdit matrix PIPE`: what comes of accelerators together, that cells are kept, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastdit import testing
from fastdit.accelerator import Level
from fastdit.bench.grammar import parse_stack
from fastdit.bench.matrix import Cell, Matrix, MatrixRun, parts_for
from fastdit.bench.matrix_command import is_pipeline
from fastdit.bench.store import BenchError
from fastdit.cli import app

PARTS = [next(iter(parse_stack(text))) for text in ("Interval 2", "Interval 1", "ToCa first=1", "FirstBlockCache 1e-9")]
NAMES = [part.describe() for part in PARTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path, Matrix]:
    pipeline, call = testing.PIPELINES["FluxPipeline"](size=64, steps=4, batch=1)
    given = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    folder = tmp_path_factory.mktemp("matrix")
    return pipeline, given, folder, MatrixRun(pipeline, given, folder).run(PARTS)


def test_every_cell_says_what_came_of_it(made: Any) -> None:
    cells = made[3].cells
    assert len(cells) == 4 + 6 and all(cell.sound for cell in cells.values())
    half, all_steps, tokens, never = ((name,) for name in NAMES)
    assert cells[half].status == "works" and cells[half].fired == half and cells[half].off
    assert cells[all_steps].status == "exact" and cells[tokens].repeats
    assert cells[never].status == "exact" and cells[never].fired == ()
    both = cells[NAMES[0], NAMES[1]]
    assert both.status == "refused" and "both decide the step cache level" in both.told and not both.seconds
    assert cells[NAMES[0], NAMES[2]].status == "works" and len(cells[NAMES[0], NAMES[2]].seconds) == 3


def test_cells_that_are_kept_are_not_run_again(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, call, folder, matrix = made
    monkeypatch.setattr(MatrixRun, "tried", lambda *_: pytest.fail("a cell was run again"))
    assert MatrixRun(pipeline, call, folder).run(PARTS).cells == matrix.cells
    with pytest.raises(BenchError, match="another pipeline or call"):
        MatrixRun(pipeline, {**call, "num_inference_steps": 5}, folder)


def test_the_gain_over_the_product_is_that_of_the_parts_and_has_an_interval(made: Any) -> None:
    matrix = made[3]
    quick = Cell(("a",), "works", "", ("a",), True, True, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    other = replace(quick, parts=("b",), seconds=(1.0,) * 3, plain=(3.0,) * 3)
    both = replace(quick, parts=("a", "b"), seconds=(1.0,) * 3, plain=(3.0,) * 3)
    planted = Matrix("p", "m", ("a", "b"), {one.parts: one for one in (quick, other, both)})
    over = planted.over_product(both)
    assert over is not None and over.estimate == pytest.approx(0.5) and over.low <= 0.5 <= over.high
    assert planted.over_product(quick) is None and "ok 0.50 [0.50, 0.50]" in planted.markdown()
    assert matrix.over_product(matrix.cells[NAMES[0], NAMES[1]]) is None


def test_a_cell_that_leaves_a_trace_or_does_not_repeat_is_wrong() -> None:
    cell = Cell(("a",), "works", "", ("a",), True, True)
    assert cell.sound and not replace(cell, off=False).sound and not replace(cell, repeats=False).sound
    assert not replace(cell, status="fails").sound and Cell(("a",), "refused", "why").sound
    wrong = Matrix("p", "m", ("a",), {("a",): replace(cell, off=False)})
    assert "(wrong)" in wrong.markdown() and 'class="fails"' in wrong.html()


def test_it_is_shown_as_text_as_data_and_as_a_page(made: Any) -> None:
    matrix = made[3]
    text, page, data = matrix.markdown(), matrix.html(), matrix.to_json()
    assert text.count("\n| ") == 1 + 4 and "both decide the step cache level" in text
    assert "* FirstBlockCache: alone, beside ToCa\n" in text  # did not fire
    # Two of a class are told apart, and a reason is told once for all of its cells.
    assert f"* {NAMES[0]} + {NAMES[1]}, {NAMES[0]} + FirstBlockCache, {NAMES[1]} + FirstBlockCache: " in text
    assert "http" not in page.replace("http-equiv", "") and page.count("<td") == 16
    assert Matrix.from_json(json.loads(json.dumps(data))) == matrix
    assert len(data["cells"]) == 10 and json.loads(json.dumps(data))["parts"] == NAMES


def test_parts_are_what_can_act_on_the_pipeline(made: Any) -> None:
    found = list(parts_for(made[0], [Level.TOKEN_CACHE, Level.STEP_CACHE]))
    names = {type(one).__name__ for one in found}
    assert {"ToCa", "DuCa", "ClusCa", "Interval", "FirstBlockCache"} <= names and "TeaCache" not in names


@pytest.mark.parametrize(("name", "pipeline"), [("mini", True), ("mini:sd3", True), ("Flux", False), ("", False)])
def test_a_name_is_a_pipelines_or_a_part_of_a_classs(name: str, pipeline: bool) -> None:
    assert is_pipeline(name) is pipeline


@pytest.mark.exhaustive
def test_the_command_writes_all_three_forms(tmp_path: Path) -> None:
    parts = ["--part", "Interval 2", "--part", "ToCa first=1", "--part", "Attention _native_math"]
    arguments = ["matrix", "mini", *parts, "--size", "64", "--steps", "4", "--triples", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("matrix.*")} == {"matrix.md", "matrix.json", "matrix.html"}
    assert len(json.loads((tmp_path / "matrix.json").read_text())["cells"]) == 7


def test_a_level_that_is_none_is_refused() -> None:
    done = CliRunner().invoke(app, ["matrix", "mini", "--level", "kernel"])
    assert done.exit_code == 2 and "the levels are schedule" in done.stderr
