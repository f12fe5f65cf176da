"""The command line answers at once, and its demo leaves what it promises."""

from __future__ import annotations

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

PROMPTS = "an apple on a blue background\n\na small car on the left on a white background\n"


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("calibrate", "demo", "matrix", "plan", "version"))


def test_version_prints_the_version() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip() == fastdit.__version__


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
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_prompts_file_without_prompts_is_refused(tmp_path: Path) -> None:
    result = calibrate(tmp_path, "--method", "magcache", prompts="\n  \n")
    assert result.exit_code == 1 and "holds no prompt" in result.stderr


def test_another_pipeline_needs_prompts_and_must_be_one(tmp_path: Path) -> None:
    command = ["calibrate", str(tmp_path), "--method", "magcache", "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "--prompts" in result.stderr
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    result = CliRunner().invoke(app, [*command, "--prompts", str(tmp_path / "prompts.txt")])
    assert result.exit_code == 1 and "model_index.json" in result.stderr


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
