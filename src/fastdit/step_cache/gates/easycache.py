"""EasyCache: skip the whole forward while its output is predicted to move little (2507.02860).

Difference from the published scripts: each guidance branch decides for itself, where they let the conditional branch
decide for both.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.config import AtLeastZero, register
from fastdit.step_cache.base import Memory, Scope, Site
from fastdit.step_cache.gates.threshold import AccumulatingGate
from fastdit.step_cache.policy import SkipPolicy


@dataclasses.dataclass
class _Rates(Memory):
    """The last step's output, and at the last computed step how fast the output followed the input."""

    output: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    rate: torch.Tensor | None = None


@register
@dataclasses.dataclass(frozen=True)
class EasyCache(AccumulatingGate):
    """Skip whole forwards until the predicted change of their output has added up to `threshold`.

        v = out - in at the last computed step;   k = mean|out - out_prev| / mean|in - in_prev|, at computed steps
        acc += k mean|in_t - in_(t-1)| / mean|out_(t-1)|;   skip (out_t = in_t + v) where acc < threshold

    `in` and `out` are the latents and the model's output, so nothing need be known of the model.

    Args:
        threshold: the sum of relative changes at which a forward is computed, at least 0; 0 never skips. Published
            values lie between .025 and .1, larger ones skip more.
        policy: by default the first two steps and the last are computed: two are needed to know k.

    And what every step cache takes: `forecast`, `per_image`, `stage_change`.

    Raises:
        InvalidConfig: for other values.
        UnsupportedModel: in a run, where the output has another shape than the latents.

    Paper: Zhou et al., Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching,
    arXiv 2507.02860.

    >>> EasyCache(0.1).whole_forward
    True
    """

    threshold: AtLeastZero = 0.05
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=2))
    scope: Scope = "forward"

    scopes: ClassVar = ("forward",)
    warm_up: ClassVar[int] = 2

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
