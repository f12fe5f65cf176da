"""Progressive resolution: half the size first, then the full one, in two stages of whole frames.

The plainest spatial schedule. What is lifted at the switch, and how late the last stage begins, make it good or bad:
the presets lift the clean estimate through pixels, so that the last stage may keep what the first composed, with one
field of noise for the whole run.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.config import register
from fastdit.errors import InvalidConfig
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.preset_schedule import PresetSchedule
from fastdit.schedule.presets import PUBLISHED, WHOLE, WHOLE_PRESETS, listed


@register
@dataclasses.dataclass(frozen=True)
class ProgressiveResolution(PresetSchedule):
    """Two stages of whole frames: at half the size, then at the full one.

    At the switch the clean estimate x0 of the first stage, enlarged, becomes s x0 + (1 - s) z at the time s. Times run
    from 0 (noise) to 1 (data).

    Args:
        preset: a setting of the model's family by how many times fewer FLOPs it costs than plain sampling: "4x", "5x",
            "7x", "10x" and "14x" of FLUX.1, "2x", "3x", "6x" and "9x" of SD3. `ProgressiveResolution()` takes the first
            of the pipeline's own. What is given beside it takes the place of the preset's; without one, `steps` are
            needed.
        steps: how many in each of the two stages, each at least 1.
        ends: the time at which the first stage ends, between 0 and 1; (.5,) where no preset says otherwise.
        starts: the time at which the last one starts; (.3,) where no preset says otherwise. Earlier ones draw
            more anew, and leave faint spots where there are few steps.
        lift: what happens at the switch: `PixelLift()` (the default), `LatentLift()`, `CorrectedLift()`,
            `SpectralLift()` or `TokenCopy()`.

    And to tinker with:
        shifts: one timestep shift a stage, .01 to 100: above 1 a stage takes smaller steps where there is more noise,
            below 1 where there is less. Left out without a preset, NT-matching solves them.
        base_shift: the timestep shift, .01 to 100, that the model was trained for (3 for both families).

    Raises:
        InvalidConfig: for an unknown preset, another family's, and values out of range.

    >>> plan = ProgressiveResolution(steps=(10, 5)).plan(64, 64, None)
    >>> [(stage.layout, stage.steps, stage.tokens) for stage in plan.stages]
    [('coarse', 10, 1024), ('fine', 5, 4096)]
    """

    layouts: ClassVar = WHOLE
    presets: ClassVar = WHOLE_PRESETS
    own: ClassVar = {"ends": (0.5,), "starts": (0.3,), "lift": PixelLift()}

    @classmethod
    def published(cls, name: str) -> ProgressiveResolution:
        """Give a published recipe: "SPEED 1%", "SPEED 5%" (FLUX.1, 50 steps), "SelfLift 4" or "SelfLift 8" (few steps).

        Raises `InvalidConfig` for another name. Papers: SPEED, arXiv 2605.18736; SelfLift, arXiv 2609.02036.

        >>> ProgressiveResolution.published("SelfLift 8").steps
        (6, 2)
        """
        if name not in PUBLISHED:
            raise InvalidConfig(f"no recipe {name!r} is known; choose one of {listed(PUBLISHED)}")
        recipe = PUBLISHED[name]
        return cls(steps=recipe.steps, ends=recipe.ends, starts=recipe.starts, shifts=recipe.shifts, lift=recipe.lift)
