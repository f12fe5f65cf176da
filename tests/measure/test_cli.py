"""The command line answers at once, and its demo leaves what it promises."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

import fastdit
from fastdit.cli import app


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "plan", "version"))


def test_version_prints_the_version() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip() == fastdit.__version__


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, fastdit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
