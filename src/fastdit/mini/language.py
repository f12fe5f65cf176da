"""What the embedded pipelines understand, and who judges their pictures, by architecture.

Prompts of training and the judge for searches are for whatever is tuned; prompts that training never used and the judge
for tables are for what is reported. The small models have one judge for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit.mini import Architecture
    from fastdit.mini.judge import Images

Purpose = Literal["search", "tables"]


class Language(Protocol):
    """The prompts that an embedded pipeline understands."""

    def held_out(self, count: int, seed: int = 0, *, background: bool = False) -> list[str]:
        """Give prompts that training never used; with `background`, those that name what is behind the objects."""
        ...

    def training(self, count: int, seed: int = 0, *, background: bool = False) -> list[str]:
        """Give prompts of training; else as `held_out`."""
        ...

    def parse(self, prompt: str) -> object:
        """Read a prompt. Raises ValueError for one that the judges can't read."""
        ...

    def vocabulary(self) -> list[str]:
        """Give every word that a prompt can hold."""
        ...


class Judge(Protocol):
    """Who says how well pictures show what was asked."""

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Give each picture's score in [0, 1], float32 [B]."""
        ...

    def features(self, images: Images) -> Tensor:
        """Give features for a Frechet distance, float32 [B, F]."""
        ...

    def parts(self, images: Images, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Say of each part that some prompt asks for whether it is right, NaN where a prompt does not ask."""
        ...


def language_of(architecture: Architecture) -> Language:
    """Give an embedded pipeline's language."""
    if architecture == "flux-512":
        from fastdit.mini.large import scenes

        return scenes
    from fastdit.mini import prompts

    return prompts


def judge_of(architecture: Architecture, purpose: Purpose) -> Judge | None:
    """Load the judge of an embedded pipeline's pictures that is meant for searches or for tables.

    None where the package has none yet; pictures are then compared with the full run's alone.
    """
    if architecture == "flux-512":
        from fastdit.mini.large.judges import is_trained
        from fastdit.mini.large.judges import load_judge as load_large_judge

        return load_large_judge(purpose) if is_trained(purpose) else None
    from fastdit.mini.judge import load_judge

    return load_judge()
