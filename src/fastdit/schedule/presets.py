"""The settings of schedules that come with presets: ours, and the published ones."""

from __future__ import annotations

from collections.abc import Mapping

from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.lifts.corrected import CorrectedLift
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.lifts.spectral import SpectralLift
from fastdit.schedule.recipe import Recipe

WHOLE, REGIONS = ("coarse", "fine"), ("coarse", "mixed", "fine")
_FLUX, _SD3 = "FLUX.1", "Stable Diffusion 3"


def _regions(steps: tuple[int, int, int], ends: tuple[float, float], ratio: float, family: str) -> Recipe:
    return Recipe(REGIONS, steps, ends, ratio, family=family)


def _whole(
    steps: tuple[int, int],
    shifts: tuple[float, float],
    family: str,
    *,
    end: float = 0.50,
    start: float = 0.30,
    lift: Lift = PixelLift(),  # noqa: B008  a frozen dataclass
) -> Recipe:
    return Recipe(WHOLE, steps, (end,), starts=(start,), lift=lift, shifts=shifts, family=family)


#: RALU's published settings by how many times fewer FLOPs they cost than 50 steps (28 of SD3), each for its family of
#: models, whose default is the first of them.
RALU_PRESETS = {
    "4x": _regions((5, 6, 7), (0.30, 0.45), 0.3, _FLUX),
    "5x": _regions((4, 5, 6), (0.30, 0.45), 0.2, _FLUX),
    "7x": _regions((2, 3, 5), (0.20, 0.30), 0.1, _FLUX),
    "2x": _regions((5, 6, 9), (0.20, 0.30), 0.3, _SD3),
    "3x": _regions((3, 3, 6), (0.25, 0.30), 0.2, _SD3),
}

#: The same for two stages of whole frames. The first stage has the family's own shift at half the size; the last one
#: steps more evenly than plain sampling does. FLUX's starts late: from nearly pure noise, its few steps leave faint
#: spots and glows beside objects.
WHOLE_PRESETS = {
    "4x": _whole((22, 6), (2.0, 0.6), _FLUX),
    "5x": _whole((20, 4), (2.0, 0.8), _FLUX),
    "7x": _whole((14, 3), (2.0, 1.2), _FLUX),
    "10x": _whole((10, 2), (2.0, 1.2), _FLUX),
    "14x": _whole((5, 2), (2.0, 1.2), _FLUX),
    "2x": _whole((28, 6), (3.0, 0.4), _SD3, start=0.15),
    "3x": _whole((20, 4), (3.0, 0.6), _SD3, start=0.15),
    "6x": _whole((7, 3), (3.0, 0.6), _SD3, start=0.15),
    "9x": _whole((5, 2), (3.0, 1.0), _SD3, start=0.20),
}

#: Two stages of whole frames as others published them. SPEED (arXiv 2605.18736) leaves the coarse size where the finer
#: one's own band is drowned in noise, to 1 % or 5 % of it, and goes back to where the noise of the kept band is right.
#: SelfLift (arXiv 2609.02036) leaves it late, at an unchanged noise level, for models that take 4 or 8 steps; the shift
#: of the first is FLUX.2's for 4 steps over 4,096 tokens.
PUBLISHED = {
    "SPEED 1%": _whole((17, 33), (3.0, 3.0), _FLUX, end=0.1472, start=0.1472 / 1.8528, lift=SpectralLift()),
    "SPEED 5%": _whole((27, 23), (3.0, 3.0), _FLUX, end=0.2818, start=0.2818 / 1.7182, lift=SpectralLift()),
    "SelfLift 4": _whole(
        (3, 1), (9.886, 9.886), "FLUX.2", end=0.2328, start=0.2328, lift=CorrectedLift(share=0.4, noise="fresh")
    ),
    "SelfLift 8": _whole(
        (6, 2), (3.0, 3.0), "Z-Image", end=0.5, start=0.5, lift=CorrectedLift(share=0.3, noise="fresh")
    ),
}


def listed(recipes: Mapping[str, Recipe]) -> str:
    """Name recipes with the models that each is for."""
    return ", ".join(f"{name} ({recipe.family})" for name, recipe in recipes.items())
