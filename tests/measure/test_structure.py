"""The checker of the source's structure counts what it says, on packages small enough to be counted by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import structure

#: A module that imports another for its types alone.
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n"


def package(directory: Path, files: dict[str, str]) -> dict[str, structure.Count]:
    """Write a package of these files, named without their suffix, and give its counts by name."""
    root = directory / "fastdit"
    for name, text in {"__init__": "", **files}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {count.name: count for count in structure.counts(root)}


def test_lines_are_those_of_the_files_and_the_core_is_a_part(tmp_path: Path) -> None:
    found = package(tmp_path, {"run": "a = 1\nb = 2\n", "twins/pipeline": "c = 3\n", "errors": "d = 4\n\n"})
    assert found["lines"].value == 5
    assert found["lines of the core"].value == 3


def test_modules_that_import_each_other_are_one_circle_each(tmp_path: Path) -> None:
    found = package(
        tmp_path,
        {
            "run": "import fastdit.record\n",
            "record": "from fastdit import step\n",
            "step": "from fastdit.run import Run\n",
            "plan": "from fastdit.stack import Stack\n",
            "stack": "from fastdit import plan\n",
            "errors": "",
        },
    )
    assert found["import circles"].behind == ("plan <-> stack", "record <-> run <-> step")


def test_a_package_that_imports_its_own_module_is_no_circle_and_one_from_outside_is(tmp_path: Path) -> None:
    inside = {"engine/__init__": "from fastdit.engine.base import Engine\n", "engine/base": "Engine = object\n"}
    assert package(tmp_path, inside)["import circles"].value == 0
    outside = {**inside, "engine/base": "import fastdit.models.family\n", "models/__init__": ""}
    outside["models/family"] = "import fastdit.engine.key\n"
    outside["engine/key"] = ""
    # models.family runs engine's package, which runs engine.base, which wants models.family.
    assert package(tmp_path, outside)["import circles"].value == 1


@pytest.mark.parametrize(
    "text",
    [
        FOR_TYPES.format("fastdit.run"),
        "def later():\n    from fastdit.run import Run\n",
    ],
    ids=["types", "call"],
)
def test_what_does_not_run_with_the_module_makes_no_circle(tmp_path: Path, text: str) -> None:
    found = package(tmp_path, {"run": "import fastdit.record\n", "record": text})
    assert found["import circles"].value == 0


def test_imports_go_down_or_stay_in_their_row(tmp_path: Path) -> None:
    found = package(
        tmp_path,
        {
            "cli": "import fastdit.mini\n",
            "measure": "import fastdit.mini\n",
            "mini": "import fastdit.errors\n",
            "errors": "",
            "run": "from fastdit.record import Record\n",
            "record": "",
            "engine/base": "import fastdit.models.family\n",
            "models/family": "",
        },
    )
    assert found["imports that go up"].value == 0


def test_an_import_of_a_higher_room_or_another_level_goes_up_in_a_function_too(tmp_path: Path) -> None:
    found = package(
        tmp_path,
        {
            "run": "\n\ndef work():\n    from fastdit.stack import Stack\n",
            "stack": "",
            "engine/base": "from fastdit.attention.base import Kernel\n",
            "attention/base": FOR_TYPES.format("fastdit.twins.pipeline"),
            "twins/pipeline": "",
        },
    )
    assert found["imports that go up"].behind == ("engine.base:1 imports attention.base", "run:4 imports stack")


def test_a_room_without_a_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cellar' has no place"):
        package(tmp_path, {"cellar": "import fastdit.errors\n", "errors": ""})


def test_only_files_of_methods_are_held_to_their_length(tmp_path: Path) -> None:
    long = "x = 1\n" * 201
    found = package(tmp_path, {"schedule/lifts/pixel": long, "models/flux": long, "schedule/ralu": long[:-6]})
    assert found["methods above 200 lines"].behind == ("   201 schedule/lifts/pixel.py",)


def test_parameters_are_counted_without_self_and_with_the_rest(tmp_path: Path) -> None:
    text = (
        "class A:\n"
        "    def six(self, a, b, /, c, *d, e, **f): ...\n"
        "    def seven(self, a, b, /, c, *d, e, g, **f): ...\n"
        "    @classmethod\n"
        "    def also_six(cls, a, b, c, d, e, f): ...\n"
    )
    found = package(tmp_path, {"errors": text})
    assert found["functions above 6 parameters"].behind == ("errors.py:3 seven has 7",)


def test_the_word_is_counted_as_a_word(tmp_path: Path) -> None:
    found = package(tmp_path, {"errors": "from typing import Any, AnyStr\nx: Any\ny = 'Anything'\n"})
    assert found["the word Any"].value == 2


@pytest.mark.exhaustive
def test_the_script_prints_every_count_before_it_fails() -> None:
    script = Path(structure.__file__)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=script.parents[1])
    assert not run.stderr
    found = structure.counts()
    assert run.returncode == int(any(count.over for count in found))
    assert all(str(count) in run.stdout for count in found)
