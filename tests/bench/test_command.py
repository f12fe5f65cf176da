"""`fastdit bench` as it is called: what it prints and keeps, that it goes on and repeats, and how slips end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastdit.cli import app

QUICK = ["--size", "64", "--steps", "6", "--minutes", "0.0001", "--prompt", "an apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bench of two stacks kept."""
    out = tmp_path_factory.mktemp("bench") / "kept"
    stacks = ["--stack", "Interval 2, ToCa first=1", "--stack", "ProgressiveResolution 4x"]
    done = CliRunner().invoke(app, ["bench", "mini", *stacks, *QUICK, "--attribute", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "Interval 2, ToCa first=1: Interval gains" in done.output and "on average" in done.output
    return out


def test_everything_is_kept_and_shown(folder: Path) -> None:
    (group,) = json.loads((folder / "results.json").read_text())
    rows = {row["row"]["name"]: row for row in group["rows"]}
    stack = "Interval 2, ToCa first=1"
    assert {"plain", stack, f"{stack}: ToCa", "ProgressiveResolution 4x"} <= set(rows)
    assert all(row["rounds"] >= 3 for row in rows.values())
    (page,) = folder.glob("*.html")
    assert "ProgressiveResolution 4x" in page.read_text()


@pytest.mark.exhaustive
def test_an_experiment_is_repeated_from_its_folder(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = CliRunner().invoke(app, ["bench", "--rerun", str(folder), "--out", str(again), "--json"])
    assert done.exit_code == 0, done.output
    manifests = [json.loads((one / "manifest.json").read_text()) for one in (folder, again)]
    assert manifests[0]["experiment"] == manifests[1]["experiment"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mini", "--stack", "TeeCache"], "did you mean TeaCache"),
        (["mini"], "at least one of its stacks"),
        (["mini", "--stack", "Interval 2", "--size", "big"], "a size is"),
        (["mini", "--stack", "Interval 2", "--size", "-64"], "a size is"),
        (["mini", "--stack", "Interval 2", "--precision", "two"], "a precision is"),
        (["mini", "--stack", "Interval 2", "--floor", "lpips=.1"], "a floor is"),
        (["mini", "--stack", "Interval 2", "--dtype", "int3"], "dtype"),
        (["mini", "--stack", "Interval 2", "--prompts", "missing.txt"], "can't be read"),
        (["nowhere", "--stack", "Interval 2"], "neither a folder"),
        (["missing.toml"], "can't be read"),
        (["--rerun", "nowhere"], "no experiment"),
        ([], "name a pipeline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line_before_anything_is_loaded(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and told in done.output and len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
