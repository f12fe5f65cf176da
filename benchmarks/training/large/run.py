"""What every stage shares: a time to spend, a log, and checkpoints from which another day goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: The working directory: checkpoints with optimisers, the log, and the pipeline's parts as they are now.
DIRECTORY = Path("fastdit-large")
_SAVE_SECONDS = 300.0
_stopped = threading.Event()


class Run:
    """One stage, trained for some minutes more each time; what a step sees depends on its number alone.

    On a CPU the minutes are those of the processor, so that other programs don't take from them.

    The learning rate warms up once and is constant from then on, so that no end has to be known. Where one is, the rate
    falls in the last `cooldown` minutes before it: `ends` is in minutes of the stage, or else the end of this call.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        minutes: float,
        device: torch.device,
        *,
        cooldown: float = 0.0,
        ends: float | None = None,
        steps: int | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.step = 0
        self.samples = 0
        #: Where the rate last began to warm up: at the start, or where weights came without their optimiser.
        self.warm_from = 0
        self._seconds = minutes * 60
        self._cooldown = cooldown * 60
        self._ends = None if ends is None else ends * 60
        self._last_step = steps
        self._earlier = 0.0
        self._clock = time.process_time if device.type == "cpu" else time.monotonic
        self._started = self._clock()
        self._saved = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def minutes(self) -> float:
        """Minutes of training so far, those of earlier calls included."""
        return (self._earlier + self._spent) / 60

    @property
    def over(self) -> bool:
        """Whether this call's time, or its number of steps, is spent, or it was asked to stop."""
        done = self._last_step is not None and self.step >= self._last_step
        ended = self._ends is not None and self._earlier + self._spent >= self._ends
        return _stopped.is_set() or self._spent >= self._seconds or done or ended

    @property
    def wants_saving(self) -> bool:
        """Whether the last checkpoint is some minutes old."""
        return time.monotonic() - self._saved > _SAVE_SECONDS

    def rate_factor(self, warmup_steps: int) -> float:
        """Give the learning rate's factor at this step."""
        left = (self._seconds if self._ends is None else self._ends - self._earlier) - self._spent
        cooling = max(0.02, left / self._cooldown) if self._cooldown and left < self._cooldown else 1.0
        return min((self.step - self.warm_from + 1) / warmup_steps, cooling)

    @staticmethod
    def generator(stream: int, number: int) -> np.random.Generator:
        """Give the random generator of a stream at some number, whatever was drawn before."""
        return np.random.default_rng((stream, number))

    def random(self, stream: int = 0) -> np.random.Generator:
        """Give this step's random generator."""
        return self.generator(stream, self.step)

    def seed(self) -> None:
        """Set torch's global generator to this step's."""
        torch.manual_seed(int(self.random(stream=99).integers(2**62)))

    def log(self, **figures: Any) -> None:
        """Write one line of JSON to the log file and to the terminal."""
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
        where = {"stage": self.name, "step": self.step, "samples": self.samples, "minutes": round(self.minutes, 2)}
        line = json.dumps({**where, **rounded})
        print(line, flush=True)
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self, **state: Any) -> None:
        """Write the checkpoint in one move, so that a reader never sees half a file."""
        partial = self._checkpoint.with_suffix(".partial")
        torch.save({**self.numbers, **state}, partial)
        os.replace(partial, self._checkpoint)
        self._saved = time.monotonic()

    def resume(self, device: torch.device) -> dict[str, Any] | None:
        """Give the last checkpoint's state, if there is one, and go on from its step."""
        if not self._checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True, map_location=device)
        self.set_numbers({name: state.pop(name) for name in self.numbers})
        return state

    @property
    def numbers(self) -> dict[str, float]:
        """How far the stage is."""
        return {
            "step": self.step,
            "samples": self.samples,
            "warm_from": self.warm_from,
            "seconds": self.minutes * 60,
        }

    def set_numbers(self, numbers: dict[str, float]) -> None:
        """Go on from there."""
        self.step, self.samples, self.warm_from = (int(numbers[name]) for name in ("step", "samples", "warm_from"))
        self._earlier = numbers["seconds"]
        self._started = self._clock()
        self._saved = time.monotonic()

    @property
    def _spent(self) -> float:
        return self._clock() - self._started

    @property
    def _checkpoint(self) -> Path:
        return self.directory / f"{self.name}.pt"


def stop_when_asked() -> None:
    """Have a first interrupt or termination end the training after its step, with everything saved."""

    def stop(number: int, frame: object) -> None:
        _stopped.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def asked_to_stop() -> bool:
    """Tell whether an interrupt or a termination came."""
    return _stopped.is_set()


@cache
def working_dtype(device: torch.device) -> torch.dtype:
    """Give bfloat16 where matrix products are quicker in it, which is not so on every processor; else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(384, 384, dtype=dtype, device=device)
        for _ in range(2):
            started = time.perf_counter()
            (matrix @ matrix).sum().item()
            seconds[dtype] = time.perf_counter() - started
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32
