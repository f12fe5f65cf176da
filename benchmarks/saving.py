"""Writing a result with the machine that it was measured on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdit.measure.environment import Environment


def save(path: Path, values: Mapping[str, Any], *, device: str = "cpu") -> None:
    """Write values with the environment as JSON; dataclasses become dictionaries."""
    write(path, {"environment": Environment.capture(device), **values})
    print(f"written to {path}")


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, whole or not at all: what was there before stays until the new file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
    partial.replace(path)
