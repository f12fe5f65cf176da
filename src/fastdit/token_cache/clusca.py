"""ClusCa: recompute one token of each cluster and let it speak for the others (2509.10312).

The paper puts this on top of a Taylor forecast of the kept outputs; here they are kept as they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.config import Count, Share, register
from fastdit.layout import gather_tokens
from fastdit.token_cache.base import Choice, TokenCache
from fastdit.token_cache.memory import TokenState


@register
@dataclasses.dataclass(frozen=True)
class ClusCa(TokenCache):
    """Recompute one image token of each cluster between full steps, and pull the others after it.

        kept_i = fresh_i                                              the token that was recomputed
        kept_i = gamma * fresh(cluster of i) + (1 - gamma) * kept_i   all others

    At a full step the image tokens that leave the last block are clustered: K-means in the L1 norm, started from the
    last full step's centroids. At a partial step each block runs its feed-forward on one random token a cluster and
    blends what comes out into what is kept of the others.

    Args:
        interval: steps from one full step to the next, from 1 (all are full).
        clusters: how many tokens of an image are recomputed, from 1.
        gamma: the weight of the fresh value for the others, 0 to 1.
        first: how many steps at the start of the run are full, from 0.
        iterations: the most rounds of K-means a full step, from 1.
        seed: of the draw of tokens, from 0.
        stage_change: "reset" makes the first step of a stage full, "carry" copies what is kept to the new tokens.

    Raises:
        InvalidConfig: for other values.
        UnsupportedModel: for a model whose blocks' parts aren't described.

    Paper: Zheng et al., Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven
    Feature Caching, arXiv 2509.10312.

    >>> ClusCa(4, clusters=8).neutral
    False
    """

    clusters: Count = 16
    gamma: Share = 0.005
    _: dataclasses.KW_ONLY
    iterations: Count = 10

    def choose(self, choice: Choice) -> torch.Tensor | None:
        """Draw one token of each cluster; where a cluster is empty, the first token of the picture stands in."""
        clusters, tokens = choice.state.clusters, choice.memory.shape[1]
        if clusters is None or clusters.shape != choice.memory.shape:
            return None
        draw = choice.state.uniform(tokens, self.seed, choice.device)
        numbers = torch.arange(min(self.clusters, tokens), dtype=torch.long, device=choice.device)
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
    keeps its centroid. Nothing changes once no token changes its cluster.
    """
    clusters = torch.cdist(tokens, centroids, p=1).argmin(dim=2)
    for _ in range(iterations):
        belongs = nn.functional.one_hot(clusters, centroids.shape[1]).to(tokens.dtype)
        sizes = belongs.sum(dim=1)[..., None]
        centroids = torch.where(sizes > 0, belongs.transpose(1, 2) @ tokens / sizes.clamp(min=1), centroids)
        before, clusters = clusters, torch.cdist(tokens, centroids, p=1).argmin(dim=2)
        if tokens.device.type == "cpu" and torch.equal(before, clusters):  # any other device would be waited for
            break
    return centroids, clusters
