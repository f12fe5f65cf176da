"""Selectors: which coarse tokens a mixed stage splits, or which fine ones join a sparse stage's anchors.

They choose by what the stage before has shown of the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
from torch.nn import functional

from fastdit.accelerator import register
from fastdit.errors import InvalidConfig
from fastdit.models.family import Family

from . import edges


class Seen(Enum):
    """What a selector may ask to see of the coarse stage, besides its clean estimate."""

    VELOCITIES = "the velocity of every step"
    TEXT_ATTENTION = "the attention between text and image at the last step"


@dataclasses.dataclass(frozen=True)
class TextExchange:
    """The attention between each image token and the text, [B, N] each: what it gives to the text, and receives."""

    given: torch.Tensor
    received: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there is to choose by at the end of a coarse stage of `rows` x `columns` tokens.

    `clean` is the estimate of the clean latents, tokens [B, rows * columns, C]; `velocities` are the stage's
    predictions, of the same shape, and `exchange` is the attention between text and image at its last step, where the
    selector `sees` them. `exact` is False where known flaws of the published code are wanted.
    """

    family: Family
    pipeline: Any
    rows: int
    columns: int
    clean: torch.Tensor
    velocities: Sequence[torch.Tensor] = ()
    exchange: TextExchange | None = None
    exact: bool = True

    def decoded(self) -> torch.Tensor:
        """Decode the clean estimate to pixels [B, 3, H, W] in about [-1, 1]."""
        return self.family.decode(self.pipeline, self.family.unpack(self.clean, self.rows, self.columns))


@dataclasses.dataclass(frozen=True)
class Selector:
    """Base of what gives a stage's tokens a score; those with the highest are split, or join."""

    #: What of the coarse stage is kept for it, if anything.
    sees: ClassVar[Seen | None] = None

    def check(self, transformer: Any) -> None:
        """Raise `UnsupportedModel` if the transformer doesn't show what the selector asks to see."""

    def scores(self, scene: Scene) -> torch.Tensor:
        """Score the tokens of each image, [B, rows * columns]."""
        raise NotImplementedError


@register
@dataclasses.dataclass(frozen=True)
class Edges(Selector):
    """Counts the edge pixels that Canny's method finds in the decoded estimate (the paper's). Runs on the CPU."""

    def scores(self, scene: Scene) -> torch.Tensor:
        return edges.edge_scores(scene.decoded(), scene.rows, scene.columns, paper=not scene.exact)


@register
@dataclasses.dataclass(frozen=True)
class PixelGradient(Selector):
    """The mean length of the decoded estimate's gradient, by central differences of its grey. Stays on the device."""

    def scores(self, scene: Scene) -> torch.Tensor:
        grey = functional.pad(edges.grey(scene.decoded())[:, None], (1, 1, 1, 1), mode="replicate")
        across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
        down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        length = torch.hypot(across, down) / 2.0
        return functional.adaptive_avg_pool2d(length, (scene.rows, scene.columns)).flatten(1)


@register
@dataclasses.dataclass(frozen=True)
class VelocityVariance(Selector):
    """The variance of the predicted velocity over the steps of the coarse stage, mean over channels.

    Where the prediction no longer turns, the picture is settled. `first` says which tokens are split: "settled" ones,
    as in Fresco (arXiv 2601.07462), or "turning" ones. Needs two steps in the coarse stage. Raises `InvalidConfig` for
    another word.
    """

    first: str = "settled"

    sees: ClassVar[Seen | None] = Seen.VELOCITIES

    def __post_init__(self) -> None:
        if self.first not in ("settled", "turning"):
            raise InvalidConfig(f'first is "settled" or "turning", got {self.first!r}')

    def scores(self, scene: Scene) -> torch.Tensor:
        if len(scene.velocities) < 2:
            raise InvalidConfig(
                "VelocityVariance compares the steps of a coarse stage, and there were fewer than two before the "
                "mixed one; give the coarse stage more steps, start at a higher strength, or use Edges()"
            )
        variance = torch.stack([velocity.float() for velocity in scene.velocities]).var(0).mean(-1)
        return -variance if self.first == "settled" else variance


@register
@dataclasses.dataclass(frozen=True)
class LatentVariance(Selector):
    """The variance of the clean latents over a token and those around it (3 x 3), mean over channels.

    Stays on the device and decodes nothing; the activation of JiT (arXiv 2603.10744) is guided by such a variance.
    """

    def scores(self, scene: Scene) -> torch.Tensor:
        grid = scene.clean.float().transpose(1, 2).unflatten(2, (scene.rows, scene.columns))
        mean, square = (
            functional.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)
            for values in (grid, grid.square())
        )
        return (square - mean.square()).mean(dim=1).flatten(1)
