"""The GPU benchmark's own logic, on tiny models on the CPU: what fails is a row, and nothing is saved as a result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gpu
from fastdit import FORA, RALU, Attention, ProgressiveResolution
from published import MODELS

#: A process that finds what this one does.
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def bench(name: str = "flux-dev", seconds: float = 60.0) -> gpu.Bench:
    return gpu.Bench(MODELS[name].smallest(), "cpu", torch.float32, time.monotonic() + seconds)


def plain(steps: int) -> gpu.Row:
    return gpu.Row(f"plain, {steps} steps", None, steps)


def measured(made: gpu.Bench, rows: list[gpu.Row], rounds: int = 2) -> list[str]:
    said: list[str] = []
    gpu.measure(made, rows, rounds=rounds, say=said.append)
    gpu.compare(rows)
    return said


def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(command(), ["--out", str(tmp_path / "gpu.json")])
    assert done.exit_code == 3 and "no CUDA device" in done.output
    assert not (tmp_path / "gpu.json").exists()


def command() -> Any:
    import typer

    app = typer.Typer()
    app.command()(gpu.main)
    return app


@pytest.mark.exhaustive
def test_trying_it_on_the_cpu_shows_rows_of_both_models_and_saves_no_result(tmp_path: Path) -> None:
    options = ["--try-on-cpu", "--only", "XFormers", "--rounds", "1", "--out", str(tmp_path / "gpu.json")]
    done = CliRunner().invoke(command(), options)
    assert done.exit_code == 0, done.output
    assert "flux-dev, 128 px" in done.output and "sd3-medium, 128 px" in done.output
    assert done.output.count("XFormers (adapter): ") >= 2 and "Error" in done.output
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("name", ["flux-dev", pytest.param("sd3-medium", marks=pytest.mark.exhaustive)])
def test_rows_are_timed_in_turns_and_set_beside_plain_runs_that_take_as_long(name: str) -> None:
    made = bench(name)
    preset = MODELS[name].architecture.presets[0]
    half, staged = gpu.Row("half", lambda: [FORA(2)], 12), gpu.Row("staged", lambda: [RALU(preset)], None)
    rows = [plain(12), plain(4), half, staged]
    measured(made, rows)
    assert [len(row.seconds) for row in rows] == [2] * 4 and all(row.error is None for row in rows)
    assert rows[0].speed_up is not None and rows[0].speed_up.estimate == 1.0
    assert half.equal_steps is not None
    assert (half.forwards, half.skipped) == (12, 6)
    assert [len(row.step_seconds) for row in rows] == [0, 0, 1, 3]
    assert half.to_json()["stack"]["accelerators"][0]["type"] == "FORA"


def test_what_fails_is_a_row_with_its_named_error_and_the_others_go_on() -> None:
    def broken() -> list[Any]:
        raise ModuleNotFoundError("No module named 'fastdit_tensorrt'")

    missing = gpu.Row("kernel", lambda: [Attention("sage")], 12)
    rows = [plain(2), gpu.Row("adapter", broken, 12), missing, gpu.Row("empty", lambda: [], 2)]
    measured(bench(), rows)
    assert rows[1].error == "ModuleNotFoundError: No module named 'fastdit_tensorrt'"
    assert (missing.error or "").startswith("UnsupportedModel: Attention(backend='sage')")
    assert [row.speed_up is None for row in rows] == [False, True, True, False]
    assert all(row.error is not None or len(row.seconds) == 2 for row in rows)


def test_what_finds_no_time_left_says_so_in_its_row_and_stops_nothing() -> None:
    def slow() -> list[Any]:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # as if the row's time were nearly over
        time.sleep(60.0)
        return []

    rows = [plain(2), gpu.Row("slow", slow, 12), gpu.Row("empty", lambda: [], 2)]
    measured(bench(), rows)
    assert rows[1].error == "left out: the time was up"
    assert [len(row.seconds) for row in rows] == [2, 0, 2]


def test_a_round_that_does_not_fit_is_not_begun() -> None:
    class Late(gpu.Bench):
        def round(self, rows: Any) -> None:
            super().round(rows)
            self.deadline = time.monotonic()

    made = Late(MODELS["flux-dev"].smallest(), "cpu", torch.float32, time.monotonic() + 60.0)
    rows = [plain(2), plain(3)]
    assert measured(made, rows, rounds=3)[-1] == "1 of 3 rounds: the time is up"
    assert [len(row.seconds) for row in rows] == [1, 1]


def test_what_is_skipped_is_imposed_in_the_published_share() -> None:
    for steps, share in ((50, 0.58), (28, 0.69), (7, 0.58)):
        mask = gpu.imposed(steps, share).mask
        assert len(mask) == steps and mask[0] and sum(mask) == round(share * steps)


def test_a_row_that_does_not_give_the_plain_picture_is_an_error_and_never_a_fast_row() -> None:
    wrong = gpu.Row("wrong", lambda: [ProgressiveResolution(steps=(1, 1))], None, same=True)
    right = gpu.Row("right", lambda: [], 6, same=True)
    measured(bench(), [plain(6), wrong, right])
    assert (wrong.error or "").startswith("ArithmeticError") and not wrong.seconds
    assert right.error is None and right.error_to_plain == 0.0


def test_a_rival_changes_the_pipeline_only_while_its_row_runs() -> None:
    made = bench()
    rival = gpu.Row("diffusers TaylorSeer", None, 4, gpu.hooked("TaylorSeerCacheConfig"))
    rows = [plain(4), rival, gpu.Row("empty", lambda: [], 4, same=True)]
    measured(made, rows)
    assert [row.error for row in rows] == [None] * 3 and not made.pipeline.transformer.is_cache_enabled


def test_it_imports_nothing_but_what_a_borrowed_machine_has() -> None:
    has = (
        "torch triton transformers opencv-python-headless typer rich scipy torchmetrics pytest peft diffusers "
        "fastdit safetensors numpy pillow filelock"
    )
    program = f"""
import importlib.metadata as metadata, re, sys
allowed, waiting = set(), {has.split()!r}
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name not in allowed:
        allowed.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name != "fastdit":
            waiting += [re.match(r"[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
class Missing:
    homes = metadata.packages_distributions()
    def find_spec(self, name, path=None, target=None):
        owners = {{re.sub(r"[-_.]+", "-", one).lower() for one in self.homes.get(name, ())}}
        if owners and not owners & allowed:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import gpu
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=PATHS)
    assert done.returncode == 0, done.stderr
