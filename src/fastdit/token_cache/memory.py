"""What token caches keep of a branch: for every block, what its children gave, and how old each token's part is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastdit.models.roles import TokenRoles
from fastdit.nested import Kwargs, Value, tensors_of


@dataclasses.dataclass
class BlockMemory:
    """What is kept of one block: its children's outputs, when each token was refreshed, and its scores.

    `refreshed` holds for each token [B, N] the step at which it was last recomputed; `place` is the block's number
    among those that run, `shape` counts images and tokens, `streams` are the shapes that came in. `score` [B, N] is of
    the last full step, `residual` of the last step that ran the block.
    """

    place: int
    roles: TokenRoles
    shape: tuple[int, int]
    streams: tuple[torch.Size, ...]
    full_step: int = -1
    kept: Kwargs = dataclasses.field(default_factory=dict)
    refreshed: torch.Tensor | None = None
    score: torch.Tensor | None = None
    residual: tuple[torch.Tensor | None, ...] = ()

    @property
    def text(self) -> int:
        """How many tokens of the text come before the image's in what the children of a joined block see."""
        roles = self.roles
        if not roles.joined or roles.text not in roles.returns:
            return 0
        return self.streams[roles.returns.index(roles.text)][1]

    def lift(self, lifted: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> None:
        """Copy all that is kept of the image to `tokens` new tokens; `lifted` does that for [B, N, ...]."""
        text, image = self.text, self.roles.returns.index(self.roles.image)

        def after_text(output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :text], lifted(output[:, text:])], dim=1) if text else lifted(output)

        for name in self.kept.keys() - set(self.roles.text_children):
            self.kept[name] = first_tensor(self.kept[name], after_text)
        if self.refreshed is not None:
            self.refreshed = lifted(self.refreshed)
        if self.score is not None:
            self.score = lifted(self.score)
        self.residual = tuple(
            lifted(part) if place == image and part is not None else part for place, part in enumerate(self.residual)
        )
        self.shape = (self.shape[0], tokens)
        shape = self.streams[image]
        self.streams = (*self.streams[:image], torch.Size((shape[0], tokens, *shape[2:])), *self.streams[image + 1 :])


@dataclasses.dataclass
class TokenState:
    """All that a token cache keeps for one transformer, branch and stage. `settled` is False inside a forward."""

    blocks: dict[tuple[str, int], BlockMemory] = dataclasses.field(default_factory=dict)
    generator: torch.Generator | None = None
    centroids: torch.Tensor | None = None
    clusters: torch.Tensor | None = None
    settled: bool = True

    def tensors(self) -> list[torch.Tensor]:
        """List every tensor that is kept."""
        return tensors_of([[vars(memory) for memory in self.blocks.values()], self.centroids, self.clusters])

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        """Bring kept outputs, ages, scores and clusters to another token layout."""

        def lifted(values: torch.Tensor) -> torch.Tensor:
            index = sources.to(values.device).repeat(values.shape[0] // len(sources), 1)
            wide = index.reshape(*index.shape, *(1,) * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
            return values.gather(1, wide)

        for memory in self.blocks.values():
            memory.lift(lifted, sources.shape[1])
        if self.clusters is not None:
            self.clusters = lifted(self.clusters)

    def drop(self) -> None:
        """Forget everything."""
        self.blocks.clear()
        self.generator = self.centroids = self.clusters = None
        self.settled = True

    def uniform(self, tokens: int, seed: int, device: torch.device) -> torch.Tensor:
        """Draw one number of [0, 1) a token from the run's own generator, the same for every image: [1, N]."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(1, tokens, generator=self.generator, dtype=torch.float32, device=device)


def first_tensor(kept: Value, function: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """Apply `function` to a child's output, or to the first of several."""
    return function(kept) if isinstance(kept, torch.Tensor) else type(kept)([function(kept[0]), *kept[1:]])
