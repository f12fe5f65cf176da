"""What is left of a background: nothing of a lit colour, something of a glow, and objects have no part in it."""

from __future__ import annotations

import numpy as np
import pytest

from grounds import residue


def _lit(side: int = 96) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    return np.array([0.6, 0.4, 0.5]) * (1 + 0.2 * x + 0.1 * y)[..., None]


def test_a_lit_colour_leaves_nothing_with_an_object_on_it_or_without() -> None:
    bare, shown = _lit(), _lit()
    shown[30:55, 40:60] = [0.9, 0.1, 0.1]
    assert residue(bare) == pytest.approx(0.0, abs=1e-12)
    assert residue(shown) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("strength", [0.02, 0.05])
def test_a_glow_beside_an_object_is_what_is_left(strength: float) -> None:
    glowing = _lit()
    glowing[30:55, 30:50] = [0.9, 0.1, 0.1]
    y, x = np.mgrid[0:96, 0:96]
    glow = strength * np.exp(-((x - 70) ** 2 + (y - 40) ** 2) / (2 * 6.0**2))
    weak, strong = residue(glowing + 0.2 * glow[..., None]), residue(glowing + glow[..., None])
    assert strong > 3 * weak > 0
