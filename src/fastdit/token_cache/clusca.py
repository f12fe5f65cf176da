"""ClusCa: recompute one token of each cluster and let it speak for the others (arXiv 2509.10312).

At a full step the image tokens that leave the last block are clustered: K-means in the L1 norm, started from the last
full step's centroids, at most `iterations` rounds. At a partial step each block runs its feed-forward on one random
token a cluster and blends what comes out into what is kept of the others:

    kept_i = fresh_i                                       the token that was recomputed
    kept_i = gamma * fresh(cluster of i) + (1 - gamma) * kept_i        all others

The paper puts this on top of a Taylor forecast of the kept outputs; here they are kept as they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.config import is_count, is_number, register
from fastdit.errors import InvalidConfig
from fastdit.layout import gather_tokens
from fastdit.token_cache.base import Choice, TokenCache
from fastdit.token_cache.memory import TokenState


@register
@dataclasses.dataclass(frozen=True)
class ClusCa(TokenCache):
    """Recompute one image token a cluster between full steps, and pull the others after it by `gamma`."""

    clusters: int = 16
    gamma: float = 0.005
    _: dataclasses.KW_ONLY
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.clusters, 1) or not is_count(self.iterations, 1):
            raise InvalidConfig(f"ClusCa's clusters and iterations are whole numbers from 1, got {self}")
        if not is_number(self.gamma) or not 0.0 <= self.gamma <= 1.0:
            raise InvalidConfig(f"ClusCa's gamma is the weight of the fresh value, 0 to 1, got {self.gamma!r}")

    def choose(self, choice: Choice) -> torch.Tensor | None:
        """Draw one token of each cluster; where a cluster is empty, the first token of the picture stands in."""
        clusters, tokens = choice.state.clusters, choice.memory.shape[1]
        if clusters is None or clusters.shape != choice.memory.shape:
            return None
        draw = choice.state.uniform(tokens, self.seed, choice.device)
        numbers = torch.arange(min(self.clusters, tokens), device=choice.device)
        members = clusters[:, None, :] == numbers[:, None]
        return torch.where(members, draw[:, None, :], -1.0).argmax(dim=2)

    def merge(self, kept: torch.Tensor, fresh: torch.Tensor, index: torch.Tensor, state: TokenState) -> torch.Tensor:
        assert state.clusters is not None
        # The mean over what was recomputed in each cluster; a token that is drawn twice counts once.
        twice = (index[:, :, None] == index[:, None, :]).tril(-1).any(dim=2)
        once = (~twice[..., None]).to(fresh.dtype)
        own = state.clusters.gather(1, index)[..., None]
        sizes = torch.zeros_like(once).scatter_add(1, own, once)
        sums = torch.zeros_like(fresh).scatter_add(1, own.expand_as(fresh), fresh * once)
        means = sums / sizes.clamp(min=1)
        blended = kept.lerp(gather_tokens(means, state.clusters), self.gamma)
        return blended.scatter(1, index[..., None].expand_as(fresh), fresh)

    def learn(self, state: TokenState, image: torch.Tensor) -> None:
        tokens = image.float()
        centroids = state.centroids
        if centroids is None or centroids.shape[0] != tokens.shape[0] or centroids.shape[2] != tokens.shape[2]:
            count = min(self.clusters, tokens.shape[1])
            first = state.uniform(tokens.shape[1], self.seed, tokens.device).argsort(dim=1)[:, :count]
            centroids = gather_tokens(tokens, first.expand(tokens.shape[0], -1))
        state.centroids, state.clusters = k_means(tokens, centroids, self.iterations)


def k_means(tokens: torch.Tensor, centroids: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster tokens [B, N, C] from given centroids [B, K, C]: the new centroids and each token's cluster [B, N].

    A token belongs to the centroid nearest in the L1 norm, a centroid is the mean of its tokens; an empty cluster
    keeps its centroid. Ends early when no token changes its cluster.
    """
    clusters = torch.cdist(tokens, centroids, p=1).argmin(dim=2)
    for _ in range(iterations):
        belongs = nn.functional.one_hot(clusters, centroids.shape[1]).to(tokens.dtype)
        sizes = belongs.sum(dim=1)[..., None]
        centroids = torch.where(sizes > 0, belongs.transpose(1, 2) @ tokens / sizes.clamp(min=1), centroids)
        before, clusters = clusters, torch.cdist(tokens, centroids, p=1).argmin(dim=2)
        if torch.equal(before, clusters):
            break
    return centroids, clusters
