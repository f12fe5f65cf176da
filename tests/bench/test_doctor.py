"""What can work here: every accelerator is asked, and what is missing is told with what mends it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import tiny
from fastdit.bench import doctor
from fastdit.cli import app
from fastdit.measure.environment import Environment


def test_every_accelerator_says_whether_it_can_act_on_a_pipeline() -> None:
    found = {finding.what.split("(")[0]: finding for finding in doctor.accelerators(tiny.pixart()[0])}
    assert found["FirstBlockCache"].works
    assert not found["RALU"].works and "PixArt" in found["RALU"].told
    names = {finding.what for finding in doctor.accelerators(tiny.flux()[0])}
    assert {"Attention('native')", "Attention('sage')"} <= {name.replace("backend=", "") for name in names}


def test_the_environment_is_told_and_a_package_that_is_too_old_comes_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(finding.works for finding in doctor.environment() if finding.what in ("machine", "diffusers"))
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    (told,) = [finding for finding in doctor.environment() if finding.what == "diffusers"]
    assert not told.works and told.remedy.startswith("pip install 'diffusers")


def test_the_command_says_it_of_the_embedded_pipeline() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0 and "ok  machine: " in done.output and "TeaCache" in done.output


def test_threads_that_sleep_between_operations_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "threads" not in {finding.what for finding in doctor.environment()}
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (told,) = [finding for finding in doctor.environment() if finding.what == "threads"]
    assert not told.works and told.remedy.startswith("unset it")
    assert "OMP_WAIT_POLICY=passive" in str(Environment.capture())
