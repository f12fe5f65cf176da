"""What the scripts share: writing a small result with the environment that it was measured in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdit.measure.environment import Environment


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Write values with the environment as JSON; dataclasses become dictionaries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": Environment.capture(), **values}
    path.write_text(json.dumps(data, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
    print(f"written to {path}")
