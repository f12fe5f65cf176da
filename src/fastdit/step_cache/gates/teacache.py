"""TeaCache: skip while the rescaled change of the first block's modulated input adds up to little (2411.19108).

Differences from the published script: P is kept from going negative, its input is clamped into the calibrated range
where one is known, the residual of every carried stream is kept, and the sum also restarts at steps that are computed
for another reason.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from fastdit.accelerator import Need
from fastdit.config import AtLeastZero, register
from fastdit.errors import UnsupportedModel
from fastdit.models.signals import signal_for
from fastdit.step_cache.base import Site
from fastdit.step_cache.coefficients import Coefficients
from fastdit.step_cache.gates.threshold import AccumulatingGate


@register
@dataclasses.dataclass(frozen=True)
class TeaCache(AccumulatingGate):
    """Skip steps until the rescaled change of the first block's modulated input has added up to `threshold`.

        d_t = mean|m_t - m_(t-1)| / mean|m_(t-1)|;   acc += P(d_t);   compute (and set acc = 0) where acc >= threshold

    m is the signal that P was fitted on, and m_(t-1) that of the step before, computed or skipped.

    Args:
        threshold: the sum of rescaled changes at which a step is computed, at least 0; 0 never skips. Published values
            lie between .25 and .8, larger ones skip more.
        coefficients: the polynomial P: a `Coefficients`, a bare tuple (highest power first), the name of a published
            set, or None to find the set of this very model.

    And what every step cache takes: `forecast`, `policy`, `per_image`, `stage_change`; one decision rules all blocks.

    Raises:
        InvalidConfig: for other values, and where the model has no published set and none is given.
        UnsupportedModel: where the model's signal is not described in `fastdit.models.signals`.

    Paper: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.

    >>> TeaCache(0.4, "flux-dev").kind
    'modulated'
    """

    threshold: AtLeastZero = 0.25
    coefficients: Coefficients | str | tuple[float, ...] | None = None

    needs: ClassVar = frozenset({Need.MODULATED_SIGNAL})
    scopes: ClassVar = ("stack",)

    def check_values(self) -> None:
        super().check_values()
        if isinstance(self.coefficients, str):
            Coefficients.named(self.coefficients)
        elif isinstance(self.coefficients, tuple):
            object.__setattr__(self, "coefficients", Coefficients(self.coefficients))

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        lists = (child for child in transformer.children() if isinstance(child, (nn.ModuleList, nn.Sequential)))
        blocks = [block for blocks in lists for block in blocks]
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

    def for_transformer(self, transformer: nn.Module) -> TeaCache:
        if isinstance(self.coefficients, Coefficients):
            return self
        name = self.coefficients
        found = Coefficients.named(name) if isinstance(name, str) else Coefficients.for_model(transformer)
        return dataclasses.replace(self, coefficients=found)

    def signal(self, site: Site) -> torch.Tensor | None:
        function = signal_for(site.block, self.kind)
        return None if function is None else function(site.block, site.hidden_states, site.args, site.kwargs)

    def rescaled(self, change: float) -> float:
        assert isinstance(self.coefficients, Coefficients)
        return self.coefficients(change)
