"""Progressive resolution: half the size first, then the full one.

The plainest spatial schedule, and the one to beat: the clean estimate of the coarse stage is enlarged as latents and
given fresh noise. `RALU` without its parts is this; with a `PixelLift` and shared noise this is RALU's default.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.config import register
from fastdit.schedule.whole_frames import WholeFrames


@register
@dataclasses.dataclass(frozen=True)
class ProgressiveResolution(WholeFrames):
    """Two whole-frame stages: coarse, fine. The default costs about a quarter of 50 steps.

    At the switch the clean estimate x0 of the coarse stage, enlarged, becomes s x0 + (1 - s) z, z fresh noise.

    Args and errors are those of `WholeFrames`: `steps`, `ends`, `starts`, `lift`, and `base_shift` to tinker with.

    >>> plan = ProgressiveResolution((10, 5)).plan(64, 64, None)
    >>> [(stage.layout, stage.steps, stage.tokens) for stage in plan.stages]
    [('coarse', 10, 1024), ('fine', 5, 4096)]
    """

    steps: tuple[int, ...] = (15, 8)
    _: dataclasses.KW_ONLY
    ends: tuple[float, ...] = (0.5,)
    starts: tuple[float, ...] = (0.15,)

    layouts: ClassVar = ("coarse", "fine")
