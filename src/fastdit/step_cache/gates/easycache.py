"""EasyCache: skip the whole forward while its output is predicted to move little (arXiv 2507.02860).

    v = out - in at the last computed step;   k = mean|out - out_prev| / mean|in - in_prev|, at computed steps
    acc += k mean|in_t - in_(t-1)| / mean|out_(t-1)|;   skip (out_t = in_t + v) where acc < threshold

`in` and `out` are the latents and the model's output. It needs no knowledge of the model at all. Difference from the
published scripts: each guidance branch decides for itself, where they let the conditional branch decide for both.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.config import is_number, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.step_cache.base import (
    Memory,
    Site,
    StepCache,
    Verdict,
)
from fastdit.step_cache.policy import SkipPolicy


@dataclasses.dataclass
class _Rates(Memory):
    """The last step's output, and at the last computed step how fast the output followed the input."""

    output: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    rate: torch.Tensor | None = None


@register
@dataclasses.dataclass(frozen=True)
class EasyCache(StepCache):
    """Skip forwards until the accumulated predicted change reaches `threshold` (published .025 to .1, 0 = never)."""

    threshold: float = 0.05
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=2))

    scope: str = "forward"

    scopes: ClassVar = ("forward",)
    warm_up: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(f"EasyCache's threshold is a relative change of at least 0, got {self.threshold!r}")

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

    def memory(self) -> Memory:
        return _Rates()

    def signal(self, site: Site) -> torch.Tensor | None:
        return site.hidden_states

    def change(self, memory: Memory, signal: torch.Tensor) -> torch.Tensor | None:
        assert isinstance(memory, _Rates)
        if memory.signal is None or memory.output is None or memory.rate is None:
            return None
        predicted = memory.rate * _mean(signal - memory.signal)
        return torch.stack([predicted, _mean(memory.output)])

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += change
        reason = f"change {change:.4f}, accumulated {memory.accumulated:.4f}"
        return Verdict(memory.accumulated >= self.threshold, reason)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Rates)
        memory.previous, memory.signal = memory.signal, signal

    def learn(self, memory: Memory, site: Site, end: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Rates) and memory.signal is not None
        if computed and memory.output is not None and memory.previous is not None:
            memory.rate = _mean(end - memory.output) / _mean(memory.signal - memory.previous)
        memory.output, memory.previous = end, None


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.abs().mean(dtype=torch.float32)
