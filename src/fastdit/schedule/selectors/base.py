"""Selectors: which coarse tokens a mixed stage splits, or which fine ones join a sparse stage's anchors.

They choose by what the stage before has shown of the picture.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import ClassVar

import torch
from torch import nn

from fastdit.config import Config
from fastdit.models.autoencoders import Coding
from fastdit.models.family import Family, Pipeline


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
    pipeline: Pipeline
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
class Selector(Config, ABC):
    """Base of what gives a stage's tokens a score; those with the highest are split, or join."""

    #: What of the coarse stage is kept for it, if anything.
    sees: ClassVar[Seen | None] = None

    #: What it asks of the autoencoder to score a frame; `Scene.decoded` asks it to decode.
    codes: ClassVar[tuple[Coding, ...]] = ()

    def check(self, transformer: nn.Module) -> None:
        """Raise `UnsupportedModel` if the transformer doesn't show what the selector asks to see."""

    @abstractmethod
    def scores(self, scene: Scene) -> torch.Tensor:
        """Score the tokens of each image, [B, rows * columns]."""
