"""TeaCache: skip while the accumulated, rescaled change of the first block's modulated input is small (2411.19108).

    d_t = mean|m_t - m_(t-1)| / mean|m_(t-1)|;   acc += P(d_t);   compute (and set acc = 0) where acc >= threshold

m_(t-1) is always the last step's signal, computed or skipped. Differences from the published script: P is kept from
going negative, its input is clamped into the calibrated range where one is known, the residual of every carried
stream is kept, and the accumulator also restarts at steps that are computed for another reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fastdit.accelerator import Need
from fastdit.config import is_number, register
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.signals import signal_for
from fastdit.step import StepContext
from fastdit.step_cache.base import (
    Memory,
    Site,
    StepCache,
    Verdict,
)
from fastdit.step_cache.coefficients import Coefficients, for_model, named


@register
@dataclasses.dataclass(frozen=True)
class TeaCache(StepCache):
    """Skip steps until the accumulated change reaches `threshold` (0 = never skip; published values .25 to .8).

    `coefficients` is a `Coefficients`, a bare tuple (highest power first), the name of a published set, or None to
    find the set of this very model. Raises `InvalidConfig` when applied to a model without one.
    """

    threshold: float = 0.25
    coefficients: Coefficients | str | tuple[float, ...] | None = None

    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.MODULATED_SIGNAL})
    scopes: ClassVar = ("stack",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(f"TeaCache's threshold is an accumulated change of at least 0, got {self.threshold!r}")
        if isinstance(self.coefficients, str):
            named(self.coefficients)
        elif isinstance(self.coefficients, (tuple, list)):
            object.__setattr__(self, "coefficients", Coefficients(tuple(self.coefficients)))
        elif self.coefficients is not None and not isinstance(self.coefficients, Coefficients):
            raise InvalidConfig(f"coefficients are a Coefficients, a tuple, a name or None, got {self.coefficients!r}")

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

    def check(self, pipeline: Any, transformer: Any) -> None:
        blocks = [block for child in transformer.children() if hasattr(child, "__getitem__") for block in list(child)]
        kinds = ("modulated", "time_embedding", "projected_time_embedding")
        if not any(signal_for(block, kind) for block in blocks for kind in kinds):
            raise UnsupportedModel(
                f"TeaCache does not know where {type(transformer).__name__} keeps its first block's modulated input; "
                "use FirstBlockCache, which needs no such knowledge, or describe the signal in fastdit.models.signals"
            )
        kind = self.for_transformer(transformer).kind
        if not any(signal_for(block, kind) for block in blocks):
            raise UnsupportedModel(
                f"these coefficients were fitted on the signal {kind!r}, and {type(transformer).__name__} has none "
                "described that reaches its blocks; choose a set that was fitted on another signal, or fit one with "
                "calibrate_teacache"
            )

    @property
    def kind(self) -> str:
        """The signal that the coefficients were fitted on."""
        return self.coefficients.signal if isinstance(self.coefficients, Coefficients) else "modulated"

    def for_transformer(self, transformer: Any) -> TeaCache:
        if isinstance(self.coefficients, Coefficients):
            return self
        found = named(self.coefficients) if isinstance(self.coefficients, str) else for_model(transformer)
        return dataclasses.replace(self, coefficients=found)

    def signal(self, site: Site) -> torch.Tensor | None:
        function = signal_for(site.block, self.kind)
        return None if function is None else function(site.block, site.hidden_states, site.args, site.kwargs)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        memory.signal = signal

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        assert isinstance(self.coefficients, Coefficients)
        memory.accumulated += self.coefficients(change)
        reason = f"change {change:.4f}, accumulated {memory.accumulated:.4f}"
        return Verdict(memory.accumulated >= self.threshold, reason)
