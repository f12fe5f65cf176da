"""What every training stage shares: a time budget, a learning-rate schedule that follows it, a log and checkpoints."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import fastdit.mini

#: Where the weights live that the package carries.
MINI = Path(fastdit.mini.__file__).parent


class Stage:
    """One named stage of the recipe, trained for a number of minutes, resumable from its last checkpoint."""

    def __init__(self, name: str, directory: Path, minutes: float) -> None:
        self.name = name
        self.directory = directory
        self.seconds = minutes * 60
        self.step = 0
        self._earlier = 0.0
        self._started = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        """Seconds trained, runs before a resume included."""
        return self._earlier + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """The share of the time budget that is spent, at most 1."""
        return min(1.0, self.elapsed / self.seconds)

    def lr_factor(self, warmup_steps: int = 50, decay_share: float = 0.4) -> float:
        """Give the learning rate's factor: linear warm-up, constant, linear decay in the last part of the time."""
        return min(1.0, (self.step + 1) / warmup_steps, max(0.02, (1 - self.progress) / decay_share))

    def log(self, **figures: Any) -> None:
        """One line of JSON, to the log file and to the terminal."""
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
        record = {"stage": self.name, "step": self.step, "minutes": round(self.elapsed / 60, 2), **rounded}
        line = json.dumps(record)
        print(line, flush=True)
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self, **state: Any) -> None:
        """Write the checkpoint in one move, so that a reader never sees half a file."""
        partial = self._checkpoint.with_suffix(".partial")
        torch.save({"step": self.step, "elapsed": self.elapsed, **state}, partial)
        os.replace(partial, self._checkpoint)

    def resume(self) -> dict[str, Any] | None:
        """The last checkpoint's state, if there is one; sets the step and the time spent."""
        if not self._checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        self.step, self._earlier = state.pop("step"), state.pop("elapsed")
        self._started = time.monotonic()
        return state

    @property
    def _checkpoint(self) -> Path:
        return self.directory / f"{self.name}.pt"
