"""Bottleneck Sampling: full resolution, then half, then full again (arXiv 2503.18940).

The first full-size steps decide the composition as plain sampling does, the middle ones run on a quarter of the tokens,
the last ones put detail in. Differences from the paper: it resizes latents with a Lanczos filter and tunes a shift for
each stage; here the lift is a part like any other and NT-matching (RALU's) gives the shifts.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.config import register
from fastdit.schedule.whole_frames import WholeFrames


@register
@dataclasses.dataclass(frozen=True)
class BottleneckSampling(WholeFrames):
    """Three whole-frame stages: fine, coarse, fine. The default costs about a fifth of 50 steps.

    At a switch to the time s the clean estimate x0, resized, becomes s x0 + (1 - s) z, z fresh noise.

    Args and errors are those of `WholeFrames`: `steps`, `ends`, `starts`, `lift`, and `base_shift` to tinker with.

    Paper: Tian et al., Training-free Diffusion Acceleration with Bottleneck Sampling, arXiv 2503.18940.

    >>> plan = BottleneckSampling().plan(64, 64, None)
    >>> [(stage.layout, stage.steps, stage.tokens) for stage in plan.stages]
    [('fine', 3, 4096), ('coarse', 11, 1024), ('fine', 4, 4096)]
    """

    steps: tuple[int, ...] = (3, 11, 4)
    _: dataclasses.KW_ONLY
    ends: tuple[float, ...] = (0.12, 0.60)
    starts: tuple[float, ...] = (0.08, 0.35)

    layouts: ClassVar = ("fine", "coarse", "fine")
