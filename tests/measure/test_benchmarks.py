"""Every script of benchmarks/ imports and says how it is called, and its README names it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fastdit import load_mini

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*SCRIPTS, "training.small.__main__"])
def test_a_script_says_how_it_is_called(name: str) -> None:
    script = importlib.import_module(name)
    app = getattr(script, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(script.main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_the_readme_names_every_script() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}.py" not in text] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SCRIPTS))
def test_what_scripts_share_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize(
    ("script", "given"),
    [("spatial", ["flux"]), ("spatial", ["sd3"]), ("quality", []), ("caching", []), ("parts", [])],
)
def test_what_a_script_compares_can_be_made(script: str, given: list[str]) -> None:
    if script == "caching":
        pytest.importorskip("cache_dit", reason="its rows hold cache-dit's")
    made = importlib.import_module(script).configurations(*given)
    pipeline = load_mini("sd3" if given == ["sd3"] else "flux")
    assert len({entry.name for entry in made}) == len(made) > 1
    assert all(callable(entry.open(pipeline)) for entry in made)
