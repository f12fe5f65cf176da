"""RALU's settings: our presets and the published ones."""

from __future__ import annotations

from collections.abc import Mapping

from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.recipe import Recipe

TWO, THREE = ("coarse", "fine"), ("coarse", "mixed", "fine")
_FLUX, _SD3 = "FLUX.1", "Stable Diffusion 3"


def _whole(steps: tuple[int, int], shifts: tuple[float, float], family: str, start: float = 0.15) -> Recipe:
    return Recipe(TWO, steps, (0.50,), starts=(start,), lift=PixelLift(), shifts=shifts, family=family)


#: The settings by how many times fewer FLOPs they cost than 50 steps (28 of SD3), each for its family of models, whose
#: default is the first of them. The first stage has the family's own shift at half the size; the last one steps more
#: evenly than plain sampling does.
PRESETS = {
    "4x": _whole((22, 6), (2.0, 0.6), _FLUX),
    "5x": _whole((20, 4), (2.0, 0.8), _FLUX),
    "7x": _whole((14, 3), (2.0, 1.2), _FLUX),
    "10x": _whole((10, 2), (2.0, 1.2), _FLUX, start=0.20),
    "14x": _whole((5, 2), (2.0, 1.2), _FLUX, start=0.20),
    "2x": _whole((28, 6), (3.0, 0.4), _SD3),
    "3x": _whole((20, 4), (3.0, 0.6), _SD3),
    "6x": _whole((7, 3), (3.0, 0.6), _SD3),
    "9x": _whole((5, 2), (3.0, 1.0), _SD3, start=0.20),
}

#: The published settings.
PAPER = {
    "4x": Recipe(THREE, (5, 6, 7), (0.30, 0.45), 0.3, family=_FLUX),
    "5x": Recipe(THREE, (4, 5, 6), (0.30, 0.45), 0.2, family=_FLUX),
    "7x": Recipe(THREE, (2, 3, 5), (0.20, 0.30), 0.1, family=_FLUX),
    "2x": Recipe(THREE, (5, 6, 9), (0.20, 0.30), 0.3, family=_SD3),
    "3x": Recipe(THREE, (3, 3, 6), (0.25, 0.30), 0.2, family=_SD3),
}


def listed(recipes: Mapping[str, Recipe]) -> str:
    """Name recipes with the models that each is for."""
    return ", ".join(f"{name} ({recipe.family})" for name, recipe in recipes.items())


def of_family(name: str) -> list[str]:
    """Name the presets for a family of models, its default first."""
    return [preset for preset, recipe in PRESETS.items() if recipe.family == name]
