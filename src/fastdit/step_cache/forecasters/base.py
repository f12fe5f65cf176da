"""Forecasters: what stands in for the blocks' residual at a step that is not computed.

A forecaster is configuration; `begin` makes the history of one run's branch, which takes in the features of the
computed steps (a list of tensors, the residuals of the carried streams) and predicts those of a skipped one.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain

import torch

from fastdit.config import Config

Features = list[torch.Tensor]


class History:
    """What a forecaster remembers: `kept` lists whole copies of the features, newest first."""

    def __init__(self) -> None:
        self.kept: list[Features] = []

    @property
    def filled(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self.kept)

    @property
    def extrapolates(self) -> bool:
        """Whether a prediction would be more than the last features."""
        return len(self.kept) > 1

    def record(self, step: int, features: Features) -> None:
        """Take in the features of a computed step."""
        raise NotImplementedError

    def predict(self, step: int) -> Features:
        """Give the features of a step that is not computed."""
        raise NotImplementedError

    def lift(self, stream: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Bring one stream of every copy to other tokens; `function` copies tokens, and all kept is linear in them."""
        self.kept = [
            [function(tensor) if place == stream else tensor for place, tensor in enumerate(features)]
            for features in self.kept
        ]

    def tensors(self) -> list[torch.Tensor]:
        """List what is kept, for the count of memory."""
        return [*chain.from_iterable(self.kept)]


@dataclasses.dataclass(frozen=True)
class Forecaster(Config, ABC):
    """Base of the forecasters: a frozen dataclass whose `begin` makes the `History` of one branch."""

    @property
    def amplifies(self) -> bool:
        """Whether noise in the features grows in a prediction, as it does in every extrapolation."""
        return True

    @abstractmethod
    def begin(self) -> History:
        """Make the history of one branch."""
