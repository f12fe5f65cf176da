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
    """Two whole-frame stages: coarse, fine. The default costs about a quarter of 50 steps."""

    steps: tuple[int, ...] = (15, 8)
    _: dataclasses.KW_ONLY
    ends: tuple[float, ...] = (0.5,)
    starts: tuple[float, ...] = (0.15,)

    layouts: ClassVar = ("coarse", "fine")
