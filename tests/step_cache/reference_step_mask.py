"""A fixed list of steps to run, with the residual reused or extrapolated along a polynomial through the last steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from diffusers import FluxTransformer2DModel
from reference_flux import Embedded, run_blocks
from torch import Tensor


def lagrange(at: int, points: list[int]) -> list[float]:
    """The weights of the values at `points` in the polynomial through them, evaluated at `at`."""
    weights = []
    for i, here in enumerate(points):
        weight = Fraction(1)
        for j, other in enumerate(points):
            if i != j:
                weight *= Fraction(at - other, here - other)
        weights.append(float(weight))
    return weights


@dataclass
class StepMaskReference:
    """The state of one branch of one run; `order` 0 reuses, 1 extrapolates linearly, 2 along a parabola."""

    mask: tuple[int, ...]
    order: int = 0
    history: list[tuple[int, Tensor]] = field(default_factory=list)

    def __call__(self, model: FluxTransformer2DModel, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        if self.mask[step]:
            image = run_blocks(model, at, at.image, at.text, 0)[-1]
            self.history = [*self.history, (step, image - at.image)][-(self.order + 1) :]
            return image, True, 0.0
        weights = lagrange(step, [when for when, _ in self.history])
        residual = sum(weight * value for weight, (_, value) in zip(weights, self.history, strict=True))
        return at.image + residual, False, 0.0
