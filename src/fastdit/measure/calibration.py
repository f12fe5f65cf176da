"""Calibration: fit TeaCache's polynomial on a model's own runs.

Over runs in which every step is computed, the relative change of the first block's modulated input and that of the
block stack's output are recorded from step to step; P is the degree-4 least-squares fit from the one to the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdit.caching.coefficients import Coefficients
from fastdit.caching.step_cache import Memory, Site, StepCache, difference
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.signals import modulated_signal
from fastdit.stack import accelerate

_DEGREE = 4


@dataclasses.dataclass
class _Changes(Memory):
    """The last step's signal and output, and how far the signal moved since."""

    moved: float | None = None
    end: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Recorder(StepCache):
    """Computes every step and writes down how much signal and output changed."""

    pairs: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def neutral(self) -> bool:
        return True

    def memory(self) -> Memory:
        return _Changes()

    def signal(self, site: Site) -> torch.Tensor | None:
        function = modulated_signal(site.block)
        if function is None:
            raise UnsupportedModel(
                f"{type(site.block).__name__} has no described modulated input; describe it in fastdit.models.signals"
            )
        return function(site.block, site.hidden_states, site.args, site.kwargs)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Changes)
        memory.moved = None if memory.signal is None else _ratio(difference(signal, memory.signal))
        memory.signal = signal

    def learn(self, memory: Memory, site: Site, end: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Changes)
        if memory.moved is not None and memory.end is not None:
            pair = memory.moved, _ratio(difference(end, memory.end))
            if all(map(math.isfinite, pair)):
                self.pairs.append(pair)
        memory.end = end


def _ratio(change: torch.Tensor) -> float:
    amount, scale = change.tolist()
    return amount / scale if scale else math.nan


def calibrate_teacache(
    pipeline: Any, prompts: Sequence[str], *, num_inference_steps: int | Sequence[int] = 28, **call: Any
) -> Coefficients:
    """Fit the polynomial for this pipeline on `prompts` (50 or more are advisable) at one or several step counts.

    `call` goes to the pipeline (height, width, guidance_scale ...). The result carries its range and how it was made;
    `save` writes it as JSON. Raises `InvalidConfig` where the runs gave too few points for a fit.
    """
    counts = [num_inference_steps] if isinstance(num_inference_steps, int) else list(num_inference_steps)
    recorder = _Recorder()
    twin = accelerate(pipeline, [recorder])
    for count in counts:
        for prompt in prompts:
            twin(prompt=prompt, num_inference_steps=count, **{"output_type": "latent", **call})
    if len(recorder.pairs) <= _DEGREE:
        raise InvalidConfig(
            f"{len(recorder.pairs)} step-to-step changes can't fix a polynomial of degree {_DEGREE}; give more prompts "
            "or more steps"
        )
    signal, output = np.array(recorder.pairs).T
    values = np.polyfit(signal, output, _DEGREE)
    residual = output - np.polyval(values, signal)
    explained = 1.0 - residual.var() / output.var()
    provenance = (
        f"calibrated on {type(pipeline).__name__}: {len(prompts)} prompts at {counts} steps, {len(signal)} points, "
        f"R squared {explained:.3f}"
    )
    return Coefficients(tuple(float(value) for value in values), (float(signal.min()), float(signal.max())), provenance)
