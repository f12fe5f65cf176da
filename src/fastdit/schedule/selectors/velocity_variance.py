"""VelocityVariance: where the prediction still turns, or no longer does."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from fastdit.config import register
from fastdit.errors import InvalidConfig
from fastdit.schedule.selectors.base import Scene, Seen, Selector


@register
@dataclasses.dataclass(frozen=True)
class VelocityVariance(Selector):
    """The variance of the predicted velocity over the steps of the coarse stage, mean over channels.

    Where the prediction no longer turns, the picture is settled. Needs two steps in the coarse stage.

    Args:
        first: which tokens are split: "settled" ones, as in Fresco (arXiv 2601.07462), or "turning" ones.

    Raises:
        InvalidConfig: for another word.

    >>> from fastdit.schedule.selectors.base import Scene
    >>> steps = [torch.zeros(1, 2, 1), torch.tensor([[[0.0], [2.0]]])]
    >>> VelocityVariance(first="turning").scores(Scene(None, None, 1, 2, steps[0], steps)).tolist()
    [[0.0, 2.0]]
    """

    first: Literal["settled", "turning"] = "settled"

    sees: ClassVar[Seen | None] = Seen.VELOCITIES

    def scores(self, scene: Scene) -> torch.Tensor:
        if len(scene.velocities) < 2:
            raise InvalidConfig(
                "VelocityVariance compares the steps of a coarse stage, and there were fewer than two before the "
                "mixed one; give the coarse stage more steps, start at a higher strength, or use Edges()"
            )
        variance = torch.stack([velocity.float() for velocity in scene.velocities]).var(0).mean(-1)
        return -variance if self.first == "settled" else variance
