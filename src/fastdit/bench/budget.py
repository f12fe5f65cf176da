"""A fixed budget: exactly so many steps are computed, and which ones is searched for beforehand.

Latency is then the same for every prompt, where a threshold's depends on it. Which steps are best is found on training
prompts, as BudCache does (arXiv 2606.13496): of all masks of so many evaluations the one whose last latents are nearest
to the full run's, by moving one evaluation at a time for as long as that helps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdit.acceleration import accelerate
from fastdit.bench.store import BenchError
from fastdit.config import Config, Count
from fastdit.errors import InvalidConfig
from fastdit.measure.environment import Environment
from fastdit.stack import Stack
from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.reuse import Reuse
from fastdit.step_cache.gates.step_mask import StepMask

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Found:
    """A mask, how far its latents are from the full run's (mean |a - b| / mean |b|), and of what that is known."""

    mask: StepMask
    error: float
    uniform_error: float
    tried: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the mask as a stack, for `accelerate(pipe, folder)`, with its provenance beside."""
        Stack([self.mask]).save_pretrained(folder)
        told = {**self.provenance, "error": self.error, "uniform_error": self.uniform_error, "masks_tried": self.tried}
        try:
            (folder / "tuning.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise BenchError(f"{folder} can't be written: {error}") from error


@dataclass(frozen=True)
class Budget(Config):
    """A search for the step mask of exactly so many evaluations.

    Args:
        steps: how many steps are computed, from 1. The first is always among them.
        forecast: what stands in for the others.
        trials: how many masks are tried at most.

    Raises:
        InvalidConfig: for other values.

    >>> Budget(steps=3).uniform(8)
    (True, False, False, True, False, False, True, False)
    """

    steps: Count = 6
    forecast: Forecaster = field(default_factory=Reuse)
    trials: Count = 64

    def uniform(self, total: int) -> Mask:
        """Give the mask whose evaluations are evenly spaced. Raises `InvalidConfig` for too many."""
        if self.steps > total:
            raise InvalidConfig(f"a budget of {self.steps} evaluations is more than the run's {total} steps")
        chosen = {-(-index * total // self.steps) for index in range(self.steps)}
        return tuple(step in chosen for step in range(total))

    def search(
        self,
        pipeline: Any,
        calls: Sequence[Mapping[str, Any]],
        num_inference_steps: int,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> Found:
        """Search for the best mask on some calls (each holds a prompt and what else a call takes).

        Raises `InvalidConfig` for no call and for a budget of more than all steps, and what `accelerate` raises.
        """
        if not calls:
            raise InvalidConfig("a budget is searched on at least one call; give prompts")
        begun = self.uniform(num_inference_steps)
        bench = _Latents(pipeline, calls, num_inference_steps)
        errors: dict[Mask, float] = {}

        def error(mask: Mask) -> float:
            if mask not in errors:
                errors[mask] = bench.error(StepMask(mask, forecast=self.forecast))
                progress("masks tried", len(errors), self.trials)
            return errors[mask]

        best, least = begun, error(begun)
        better = True
        while better and len(errors) < self.trials:
            better = False
            for mask in _moved(best):
                if len(errors) >= self.trials and mask not in errors:
                    break
                if error(mask) < least:
                    # Evaluations tend to move the same way, so that the search goes on from here.
                    best, least, better = mask, errors[mask], True
                    break
        told = {
            "budget": self.steps,
            "steps": num_inference_steps,
            "calls": [str(call.get("prompt", "embeddings")) for call in calls],
            "environment": asdict(Environment.capture()),
        }
        return Found(StepMask(best, forecast=self.forecast), least, errors[begun], len(errors), told)


class _Latents:
    """The full run's last latents of every call, and how far a stack's are from them."""

    def __init__(self, pipeline: Any, calls: Sequence[Mapping[str, Any]], steps: int) -> None:
        self._pipeline, self._calls, self._steps = pipeline, calls, steps
        self._full = [self._run(pipeline, number) for number in range(len(calls))]

    def _run(self, pipeline: Any, number: int) -> torch.Tensor:
        call = {**self._calls[number], "num_inference_steps": self._steps, "output_type": "latent"}
        latents: torch.Tensor = pipeline(**call, generator=torch.Generator().manual_seed(number)).images
        return latents.float()

    def error(self, mask: StepMask) -> float:
        """Give the mean over the calls."""
        twin = accelerate(self._pipeline, [mask])
        off = [
            ((self._run(twin, number) - full).abs().mean() / full.abs().mean()).item()
            for number, full in enumerate(self._full)
        ]
        return sum(off) / len(off)


def _moved(mask: Mask) -> Iterator[Mask]:
    """Give the masks in which one evaluation is elsewhere: a step away first, then further; the first one stays."""
    places = [step for step, computed in enumerate(mask) if computed and step]
    for distance in range(1, len(mask)):
        for place in places:
            for moved in (place - distance, place + distance):
                if 0 < moved < len(mask) and not mask[moved]:
                    yield tuple((computed and step != place) or step == moved for step, computed in enumerate(mask))
