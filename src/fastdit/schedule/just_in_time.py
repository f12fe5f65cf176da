"""Just-in-time sampling: a full-size picture of which few tokens are computed at first (JiT, arXiv 2603.10744).

Nothing is enlarged. Early stages run on sparse anchors at their places in the full frame; where the estimate of the
clean picture varies most, further tokens join them, and the last stage has all. Differences from the paper: what lies
between the anchors is interpolated where it is needed, at a switch and for a run that is interrupted, instead of being
moved along at every step, for a token that joins is set anew; all tokens of a switch join at once, where the paper lets
them in over three small steps; noise levels are spaced by a timestep shift, where the paper's follow a beta
distribution of (1.4, 0.42).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, ClassVar

from fastdit.accelerator import Need
from fastdit.config import Count, Range, Shift, register
from fastdit.errors import InvalidConfig
from fastdit.models.autoencoders import Coding
from fastdit.models.family import Family, Pipeline
from fastdit.schedule.anchors import AnchorRun
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.schedule.matching import stage_sigmas
from fastdit.schedule.recipe import Between, check_rising, shared_steps
from fastdit.schedule.selectors.base import Selector
from fastdit.schedule.selectors.latent_variance import LatentVariance
from fastdit.schedule.staged import Generators
from fastdit.step import SchedulePlan, StagePlan


@register
@dataclasses.dataclass(frozen=True)
class JustInTime(Schedule):
    """Stages on more and more of the full frame's tokens. The default costs about a quarter of 50 steps.

    A token that joins at the time t is set to t x0 + (1 - t) z, x0 the clean estimate between the anchors, z the noise
    that the run began with there. The first anchors are spread evenly and are the same for every image; after that
    every image has its own. Works where tokens can be placed one by one, and on grids of any size.

    Args:
        steps: how many a stage, two stages or more.
        shares: the part of the tokens that each stage but the last computes, rising, between 0 and 1.
        selector: scores the tokens by the clean estimate; those with the highest scores join.

    And to tinker with:
        shift: the timestep shift that spaces the steps, .01 to 100: of all together, as in plain sampling, or with
            `ends` of each stage between its own two times. The default has the mean noise level of the paper's
            distribution, so that switches come early, while there is little to lose.
        ends: the times (0 = noise, 1 = data) at which all stages but the last end, rising.

    Raises:
        InvalidConfig: for values out of range, and a selector that must see more than the clean estimate.

    Paper: Just-in-Time, arXiv 2603.10744.

    >>> plan = JustInTime((6, 6), shares=(0.5,)).plan(9, 7, None)
    >>> [(stage.layout, stage.steps, stage.tokens) for stage in plan.stages]
    [('sparse', 6, 32), ('fine', 6, 63)]
    """

    steps: Annotated[tuple[Count, ...], Range(at_least=2)] = (7, 6, 5)
    _: dataclasses.KW_ONLY
    shares: tuple[Between, ...] = (0.35, 0.62)
    ends: tuple[Between, ...] | None = None
    selector: Selector = dataclasses.field(default_factory=LatentVariance)
    shift: Shift = 6.0

    needs: ClassVar = frozenset({Need.TOKEN_POSITIONS})

    def check_values(self) -> None:
        super().check_values()
        sparse = len(self.steps) - 1
        check_rising("JustInTime's shares", self.shares, sparse)
        if self.ends is not None:
            check_rising("JustInTime's ends", self.ends, sparse)
        if self.selector.sees is not None:
            raise InvalidConfig(
                "selector is one that looks at the clean estimate alone, such as LatentVariance() or Edges(), got "
                f"{self.selector!r}"
            )

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages. Raises `InvalidConfig` for fewer steps than stages."""
        steps, notes = shared_steps("JustInTime", self.steps, num_inference_steps)
        cells = rows * columns
        anchors = [max(1, round(share * cells)) for share in self.shares]
        if self.ends is None:
            sigmas = stage_sigmas(0.0, 1.0, self.shift, sum(steps))
            bounds = [0, *accumulate(steps)]
            spans = [sigmas[first : last + 1] for first, last in pairwise(bounds)]
        else:
            times = pairwise([0.0, *self.ends, 1.0])
            spans = [stage_sigmas(*time, self.shift, count) for time, count in zip(times, steps, strict=True)]
        layouts = ["sparse"] * len(anchors) + ["fine"]
        stages = zip(layouts, [*anchors, cells], steps, spans, strict=True)
        return SchedulePlan(tuple(StagePlan(i, *stage) for i, stage in enumerate(stages)), rows, columns, notes)

    def codings(self, before: StagePlan, after: StagePlan, cells: int) -> Sequence[tuple[Coding, int]]:
        """Name what the selector asks for of the whole frame; the last stage has all tokens without it."""
        return [] if after.layout == "fine" else [(coding, cells) for coding in self.selector.codes]

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Pipeline, generator: Generators) -> ScheduleRun:
        """Make the state of one run, which draws nothing."""
        return AnchorRun(plan, family, pipeline, self.selector)
