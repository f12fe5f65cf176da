"""The GPU benchmarks' own logic, on tiny models on the CPU: what fails is a row, and what was measured is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import gpu.check
import gpu.measure
import gpu.rivals
from fastdit import FORA, RALU, Attention, ProgressiveResolution
from gpu import bench, others, results, rows
from published import MODELS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"

#: A process that finds what this one does.
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def made(name: str = "flux-dev", seconds: float = 600.0) -> bench.Bench:
    return bench.Bench(MODELS[name].smallest(), "cpu", torch.float32, time.monotonic() + seconds)


def measured(on: bench.Bench, given: list[rows.Row], rounds: int = 2) -> list[str]:
    said: list[str] = []
    bench.measure(on, given, rounds=rounds, keep=lambda: None, say=said.append)
    return said


def compared(given: Sequence[rows.Row]) -> dict[str, results.Comparison]:
    return {one.name: one for one in results.compared([[row.to_json() for row in given]])}


def command(script: Any) -> typer.Typer:
    app = typer.Typer()
    app.command()(script.main)
    return app


@pytest.mark.parametrize("script", [gpu.check, gpu.measure, gpu.rivals])
def test_without_a_gpu_it_says_so_and_exits_with_3(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(command(script), ["--out", str(tmp_path / "gpu.json")])
    assert done.exit_code == 3 and "no CUDA device" in done.output
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("script", "options"),
    [
        (gpu.check, ["--only", "sd3"]),
        (gpu.measure, ["--models", "flux-dev,sd3-medium", "--rounds", "2", "--only", "XFormers"]),
        (gpu.rivals, ["--rounds", "2", "--only", "diffusers TaylorSeer"]),
    ],
)
def test_a_rehearsal_walks_through_a_script_and_writes_what_it_found_as_a_rehearsal(
    script: Any, options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    call = [*options, "--rehearse", "--minutes", "6", "--out", str(out)]
    done = CliRunner().invoke(command(script), call, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["rehearsal"] is True
    if script is gpu.check:
        names = [one["name"] for one in found["findings"] if one["error"] is None]
        assert len(names) > 20 and "flux-dev_plain_step_seconds" in found
    else:
        assert all(len(model["processes"][0][0]["seconds"]) == 2 for model in found["models"].values())
        assert "plain, 12 steps" in done.output and "published: 0.12885 s (SGLang, H100)" in done.output


@pytest.mark.parametrize("name", ["flux-dev", pytest.param("sd3-medium", marks=pytest.mark.exhaustive)])
def test_rows_are_timed_in_turns_and_set_beside_plain_runs_that_take_as_long(name: str) -> None:
    on = made(name)
    preset = MODELS[name].architecture.presets[0]
    half, staged = rows.Row("half", lambda: [FORA(2)], 12), rows.Row("staged", lambda: [RALU(preset)], None)
    given = [rows.plain(12), rows.plain(4), half, staged]
    measured(on, given)
    assert [len(row.seconds) for row in given] == [2] * 4 and all(row.error is None for row in given)
    found = compared(given)
    assert found["plain, 12 steps"].speed_up == 1.0 and found["half"].equal_steps is not None
    assert (half.forwards, half.skipped) == (12, 6)
    assert [len(row.step_seconds) for row in given] == [0, 0, 1, 3]
    assert half.to_json()["stack"]["accelerators"][0]["type"] == "FORA"


@pytest.mark.exhaustive
def test_what_a_step_waits_for_is_told_by_stage_of_the_steps_that_ran_in_whole() -> None:
    half, staged = rows.Row("half", lambda: [FORA(2)], 12), rows.Row("staged", lambda: [RALU("4x")], None)
    given = [rows.plain(6), half, staged]
    measured(made(), given, rounds=1)
    assert [[stage.steps for stage in row.stages] for row in given] == [[5], [5], [4, 6, 7]]
    assert all(0 < stage.host_seconds <= stage.seconds for row in given for stage in row.stages)


@pytest.mark.exhaustive
def test_a_batch_is_timed_beside_the_plain_run_of_as_many() -> None:
    four = rows.Row("four", lambda: [], 2, same=True, batch=4)
    given = [rows.plain(2), rows.plain(2, 4), four]
    measured(made(), given, rounds=1)
    assert four.error is None and four.error_to_plain == 0.0
    assert given[1].name == "plain, 2 steps, batch 4"
    assert compared(given)["four"].speed_up == given[1].seconds[0] / four.seconds[0]


def test_what_fails_is_a_row_with_its_named_error_and_the_others_go_on() -> None:
    def broken() -> list[Any]:
        raise ModuleNotFoundError("No module named 'fastdit_tensorrt'")

    missing = rows.Row("kernel", lambda: [Attention("sage")], 12)
    given = [rows.plain(2), rows.Row("adapter", broken, 12), missing, rows.Row("empty", lambda: [], 2)]
    measured(made(), given)
    assert given[1].error == "ModuleNotFoundError: No module named 'fastdit_tensorrt'"
    assert (missing.error or "").startswith("UnsupportedModel: Attention(backend='sage')")
    assert list(compared(given)) == ["plain, 2 steps", "empty"]
    assert all(row.error is not None or len(row.seconds) == 2 for row in given)


def test_what_finds_no_time_left_says_so_in_its_row_and_stops_nothing() -> None:
    def slow() -> list[Any]:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # as if the row's time were nearly over
        time.sleep(60.0)
        return []

    given = [rows.plain(2), rows.Row("slow", slow, 12), rows.Row("empty", lambda: [], 2)]
    measured(made(), given)
    assert given[1].error == "left out: the time was up"
    assert [len(row.seconds) for row in given] == [2, 0, 2]


def test_a_round_that_does_not_fit_is_not_begun_and_those_before_it_are_kept() -> None:
    class Late(bench.Bench):
        def time(self, row: rows.Row) -> None:
            super().time(row)
            self.deadline = time.monotonic()

    on = Late(MODELS["flux-dev"].smallest(), "cpu", torch.float32, time.monotonic() + 600.0)
    given = [rows.plain(2), rows.plain(3), rows.plain(4)]
    measured(on, given, rounds=3)
    assert sorted(len(row.seconds) for row in given) == [1, 1, 2] and all(row.error is None for row in given)


def test_a_round_that_is_broken_off_leaves_a_row_what_it_had() -> None:
    on, row = made(), rows.plain(2)
    measured(on, [row], rounds=1)
    on.deadline = time.monotonic()
    on.time(row)
    assert row.error is None and len(row.seconds) == 1


def test_rows_that_came_too_late_at_first_are_begun_when_the_others_have_their_rounds() -> None:
    class Slow(bench.Bench):
        begins = False  # type: ignore[assignment]

    on = Slow(MODELS["flux-dev"].smallest(), "cpu", torch.float32, time.monotonic() + 600.0)
    given = [rows.plain(2), rows.plain(3)]
    said = measured(on, given)
    assert [line.partition(":")[0] for line in said] == ["plain, 2 steps", "round 2", "plain, 3 steps", "round 2"]
    assert [len(row.seconds) for row in given] == [2, 2]


def test_a_device_that_fails_after_a_row_ends_the_session_and_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Any]:
        monkeypatch.setattr(bench, "release", lambda device: torch.zeros(1).view(2))  # as every call of the device then
        raise RuntimeError("an illegal memory access was encountered")

    given = [rows.plain(2), rows.Row("graphs", broken, 2), rows.Row("empty", lambda: [], 2)]
    with pytest.raises(bench.DeviceLost, match="--skip 'graphs'"):
        measured(made(), given)
    assert given[0].seconds and given[1].error == "RuntimeError: an illegal memory access was encountered"


def test_what_is_skipped_is_imposed_in_the_published_share() -> None:
    for steps, share in ((50, 0.58), (28, 0.69), (7, 0.58)):
        mask = rows.imposed(steps, share).mask
        assert len(mask) == steps and mask[0] and sum(mask) == round(share * steps)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_cells_are_every_schedule_engine_and_mask_once_and_all_can_be_stated(name: str) -> None:
    cells = rows.Cells(MODELS[name], "engines")
    given = cells.claims()
    assert len({row.name for row in given}) == len(given)
    stated = [row.name for row in given if row.make is not None and row.batch == 1 and "attention" not in row.name]
    schedules = {"", *(f"RALU {one.preset}" for one in (cells.fast, cells.slow)), *(
        f"ProgressiveResolution {one.preset}" for one in (cells.whole_fast, cells.whole_slow)
    )}  # fmt: skip
    expected = {
        ", ".join(filter(None, (schedule, mask, engine))) or "empty stack"
        for schedule in schedules
        for mask in ("", "mask")
        for engine in ("", "Compile", "CUDA graphs", "AOT")
    }
    assert expected <= set(stated) and given[0].plain and given[0].steps == cells.steps


@pytest.mark.exhaustive
def test_a_row_that_does_not_give_the_plain_picture_is_an_error_and_never_a_fast_row() -> None:
    wrong = rows.Row("wrong", lambda: [ProgressiveResolution(steps=(1, 1))], None, same=True)
    right = rows.Row("right", lambda: [], 6, same=True)
    measured(made(), [rows.plain(6), wrong, right])
    assert (wrong.error or "").startswith("ArithmeticError") and not wrong.seconds
    assert right.error is None and right.error_to_plain == 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize("rival", [others.hooked("TaylorSeerCacheConfig"), others.cache_dit])
def test_a_rival_changes_the_pipeline_only_while_its_row_runs(rival: rows.Rival) -> None:
    pytest.importorskip("cache_dit") if rival is others.cache_dit else None
    on = made()
    own = type(on.pipeline)
    row = rows.Row("rival", None, 4, rival)
    given = [rows.plain(4), row, rows.Row("empty", lambda: [], 4, same=True)]
    measured(on, given)
    assert [one.error for one in given] == [None] * 3
    assert (type(on.pipeline), "forward" in vars(on.pipeline.transformer)) == (own, False)
    assert own.__call__.__module__.startswith("diffusers.")


def test_two_processes_with_three_rounds_each_give_an_interval_and_fewer_give_a_ratio() -> None:
    def process(rounds: int) -> list[dict[str, Any]]:
        plain, fast = rows.plain(12), rows.Row("fast", lambda: [], 12)
        plain.seconds, fast.seconds = [4.0] * rounds, [2.0] * rounds
        return [plain.to_json(), fast.to_json()]

    for processes, known in (([process(5)], False), ([process(3), process(2)], False), ([process(3)] * 2, True)):
        found = {one.name: one for one in results.compared(processes)}["fast"]
        assert found.speed_up == 2.0 and (found.interval is not None) is known


def test_results_join_what_the_same_machine_has_measured_before_and_refuse_another(tmp_path: Path) -> None:
    path, model, row = tmp_path / "gpu.json", MODELS["flux-dev"], rows.plain(12)
    row.seconds = [4.0]
    for count in (1, 2):
        file = results.Results(path, device="cpu", dtype=torch.bfloat16, rehearsal=True)
        file.keep("flux-dev", [row], file.add("flux-dev", model, 1))
        assert len(json.loads(path.read_text())["models"]["flux-dev"]["processes"]) == count
    with pytest.raises(ValueError, match="of another rehearsal"):
        results.Results(path, device="cpu", dtype=torch.bfloat16, rehearsal=False)


def test_a_check_that_fails_is_told_apart_from_what_is_not_to_be_had(tmp_path: Path) -> None:
    def missing(finding: Any) -> None:
        raise ModuleNotFoundError("No module named 'sage'")

    def wrong(finding: Any) -> None:
        raise ArithmeticError("its latents are not finite")

    check = gpu.check.Check("cpu", tmp_path / "check.json", 1.0, rehearsal=True)
    for act in (missing, wrong, lambda finding: None):
        check.attempt(gpu.check.Finding("it"), act)
    assert [str(one).split()[0] for one in check.findings] == ["none", "FAIL", "ok"]
    assert len(json.loads((tmp_path / "check.json").read_text())["findings"]) == 3


@pytest.mark.exhaustive
def test_the_scripts_import_nothing_but_what_a_borrowed_host_has_and_their_wheels() -> None:
    has = "torch triton transformers opencv-python-headless typer rich scipy torchmetrics pytest peft numpy pillow"
    listed = (FOLDER / "wheels.txt").read_text(encoding="utf-8").splitlines()
    wheels = [re.split("[=]", line)[0] for line in listed if not line.startswith("#")]
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
        waiting += [re.match(r"[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
allowed |= {{re.sub(r"[-_.]+", "-", name).lower() for name in {[*wheels, "fastdit", "idna", "urllib3", "certifi"]!r}}}
homes = metadata.packages_distributions()
class Only:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        owners = {{re.sub(r"[-_.]+", "-", one).lower() for one in homes.get(name, ())}}
        return None if owners and not owners & allowed else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Only, sys.meta_path)
import gpu.check, gpu.measure, gpu.rivals
from fastdit.mini import pipeline_flux, pipeline_sd3
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=PATHS)
    assert done.returncode == 0, done.stderr
