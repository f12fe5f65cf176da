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
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": Environment.capture(device), **values}
    path.write_text(json.dumps(data, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
    print(f"written to {path}")
