"""The command line answers at once, and its demo leaves what it promises."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fastdit
from fastdit import (
    Coefficients,
    MagCache,
    MagnitudeCurve,
    Stack,
    TeaCache,
)
from fastdit.cli import app
from tests.measure.samples import make_results

PROMPTS = "an apple on a blue background\n\na small car on the left on a white background\n"


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("calibrate", "demo", "matrix", "plan", "version"))


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version_prints_the_version(asked: str) -> None:
    assert CliRunner().invoke(app, [asked]).output.strip() == fastdit.__version__


def test_the_command_is_there_as_a_module_too() -> None:
    command = [sys.executable, "-m", "fastdit", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == fastdit.__version__


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a stack that is no JSON, and a file."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "stack.json").write_text("{")
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan nowhere", "nowhere"),
        ("plan broken", "is not JSON"),
        ("plan --steps 0", "num_inference_steps"),
        ("plan --height -5", "height is a number of pixels, got -5"),
        ("matrix nonsense", "has 'nonsense' in its name"),
        ("engines list --directory nowhere", "nowhere is no directory"),
        ("engines clear --directory nowhere", "nowhere is no directory"),
        ("demo --out file", "file"),
        ("demo --out file/below", "file/below"),
    ],
)
def test_what_can_t_be_done_is_said_in_one_line(
    command: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_plan_says_that_its_size_is_cut() -> None:
    assert "100 x 256 px are no whole number of tokens" in CliRunner().invoke(app, ["plan", "--height", "100"]).output


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_matrix_prints_what_it_has(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdit.measure import support

    answers = iter([support.Support(name, "", None, *[support.Answer(None)] * 4) for name in ("First",) * finished])

    def interrupted(pipeline: type) -> support.Support:
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    monkeypatch.setattr(support, "supported", interrupted)
    result = CliRunner().invoke(app, ["matrix", "Flux", "--json"])
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr and len(json.loads(result.stdout or "[]")) == finished


def test_an_interrupted_demo_shows_what_it_kept_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdit.measure import demo

    results = make_results()
    cut = dataclasses.replace(results, settings={**results.settings, "interrupted": "after 12 of 18 rounds"})
    monkeypatch.setattr(demo, "run_demo", lambda directory, **options: cut)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "new" / "folder")])
    assert result.exit_code == 130 and (tmp_path / "new" / "folder").is_dir()
    assert "Interrupted after 12 of 18 rounds; what was measured until then is kept in" in result.stderr
    assert "RALU 4x" in result.stdout and "could not" in result.stdout


def test_progress_without_a_terminal_is_said_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from fastdit.cli import _progress

    with _progress(Console(stderr=True)) as progress:
        for done in (1, 2, 3, 4, 4):
            progress("measuring", done, 4)
    assert capsys.readouterr().err.splitlines() == ["measuring 1/4", "measuring 4/4"]


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, fastdit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def calibrate(folder: Path, *options: str, prompts: str = PROMPTS) -> Result:
    """Run the command on the embedded pipeline with two prompts at its small size."""
    (folder / "prompts.txt").write_text(prompts)
    files = ("--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out.json"))
    return CliRunner().invoke(app, ["calibrate", "mini", *files, "--height", "128", "--width", "128", *options])


def test_a_curve_is_calibrated_by_a_command_and_used_by_the_line_that_it_prints(tmp_path: Path) -> None:
    result = calibrate(tmp_path, "--method", "magcache", "--steps", "4")
    assert result.exit_code == 0, result.output
    curve = MagnitudeCurve.load(tmp_path / "out.json")
    assert len(curve.ratios) == 4
    where, use = result.stdout.strip().splitlines()
    assert where == f"{tmp_path / 'out.json'}: {curve.provenance}"
    assert "2 prompts at 4 steps" in where and "ratios" in where and "standard deviation" in where
    assert "calibrating" in result.stderr and "2/2" in result.stderr
    cache = eval(use, {"MagCache": MagCache, "MagnitudeCurve": MagnitudeCurve})
    assert cache == MagCache(0.24, curve=curve)
    assert Stack.from_json(json.loads(json.dumps(Stack([cache]).to_json()))) == Stack([cache])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.json", "prompts.txt"]


def test_a_polynomial_is_calibrated_by_a_command_and_used_by_the_line_that_it_prints(tmp_path: Path) -> None:
    options = ("--method", "teacache", "--steps", "4", "--steps", "3", "--signal", "hidden_states", "--guidance", "2")
    result = calibrate(tmp_path, *options)
    assert result.exit_code == 0, result.output
    fitted = Coefficients.load(tmp_path / "out.json")
    assert fitted.signal == "hidden_states"
    where, use = result.stdout.strip().splitlines()
    assert "guidance_scale=2.0" in where and "[4, 3] steps" in where and "R squared" in where and "changes" in where
    cache = eval(use, {"TeaCache": TeaCache, "Coefficients": Coefficients})
    assert cache == TeaCache(0.25, coefficients=fitted)
    assert ("FastditWarning: " in result.stderr) == ("falls" in where)
    assert Stack.from_json(json.loads(json.dumps(Stack([cache]).to_json()))) == Stack([cache])


def test_a_seed_repeats_a_calibration(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert calibrate(tmp_path, "--method", "magcache", "--steps", "2", "--seed", seed).exit_code == 0
        found.append((tmp_path / "out.json").read_text())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "magcache", "--steps", "4", "--steps", "3"), "one step count"),
        (("--method", "magcache", "--steps", "1"), "one step count"),
        (("--method", "teacache", "--steps", "2"), "more steps"),
        (("--method", "teacache", "--steps", "2", "--signal", "output"), "hidden_states"),
        (("--method", "teacache", "--steps", "2", "--signal", "time_embedding"), "FluxTransformerBlock"),
        (("--method", "magcache", "--signal", "modulated"), "--signal"),
        (("--method", "magcache", "--dtype", "int8"), "--dtype is one of"),
        (("--method", "magcache", "--device", "abacus"), "--device"),
        (("--method", "magcache", "--out", "nowhere/out.json"), "no directory"),
        (("--method", "magcache", "--prompts", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_calibration_that_can_t_be_done_says_why_and_writes_nothing(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    result = calibrate(tmp_path, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_prompts_file_without_prompts_is_refused(tmp_path: Path) -> None:
    result = calibrate(tmp_path, "--method", "magcache", prompts="\n  \n")
    assert result.exit_code == 2 and "holds no prompt" in result.stderr


def test_another_pipeline_needs_prompts_and_must_be_one(tmp_path: Path) -> None:
    command = ["calibrate", str(tmp_path), "--method", "magcache", "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "--prompts" in result.stderr
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    result = CliRunner().invoke(app, [*command, "--prompts", str(tmp_path / "prompts.txt")])
    assert result.exit_code == 2 and "model_index.json" in result.stderr


def test_a_saved_pipeline_is_calibrated_by_its_directory(tmp_path: Path) -> None:
    import tiny

    tiny.flux(text=True)[0].save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    command = ["calibrate", str(tmp_path / "model"), "--method", "magcache", "--steps", "2"]
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, [*command, *files, "--height", "64", "--width", "64"])
    assert result.exit_code == 0, result.output
    assert "FluxPipeline" in MagnitudeCurve.load(tmp_path / "out.json").provenance


def test_the_embedded_pipeline_is_calibrated_on_prompts_of_its_training() -> None:
    from fastdit.cli import MINI_PROMPTS, read_prompts
    from fastdit.mini.prompts import parse

    prompts = read_prompts("mini", None)
    assert len(set(prompts)) == MINI_PROMPTS
    assert not any(parse(prompt).held_out for prompt in prompts)
