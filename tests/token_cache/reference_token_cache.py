"""Token caches in a straight line, for one branch of FLUX: every block taken apart, chosen rows put in with a mask.

Nothing is saved here: at a partial step the feed-forward runs on all tokens and the rows that were not chosen are
thrown away. Tokens are chosen with Python's own sort.

full step      run everything; keep what attention and feed-forward gave, and the blocks' residuals
partial step   attention as kept; feed-forward: chosen image rows fresh, all others as kept, the text's too
reused step    output = input + kept residual
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from reference_flux import Embedded
from torch import Tensor


def heads_of(x: Tensor, attn: Any) -> Tensor:
    """[B, S, H * D] as [B, S, H, D]."""
    return x.unflatten(2, (attn.heads, -1))


def attend(attn: Any, image: Tensor, text: Tensor | None, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Attention written out: (result [B, S, C], map [B, H, S, S], values [B, S, H, D]), the text's tokens first."""
    query, key = attn.norm_q(heads_of(attn.to_q(image), attn)), attn.norm_k(heads_of(attn.to_k(image), attn))
    value = heads_of(attn.to_v(image), attn)
    if text is not None:
        text_query = attn.norm_added_q(heads_of(attn.add_q_proj(text), attn))
        text_key = attn.norm_added_k(heads_of(attn.add_k_proj(text), attn))
        query, key = torch.cat([text_query, query], 1), torch.cat([text_key, key], 1)
        value = torch.cat([heads_of(attn.add_v_proj(text), attn), value], 1)
    query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).div(math.sqrt(query.shape[3])).softmax(3)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2), weights, value


@dataclass
class Kept:
    """What is kept of one block."""

    attention: Any = None
    fed: Any = None
    text_fed: Any = None
    residual: tuple[Tensor, Tensor] | None = None
    score: Tensor | None = None
    ages: list[list[int]] = field(default_factory=list)


@dataclass
class ToCaReference:
    """The state of one branch of one run."""

    steps: int
    interval: int = 4
    ratio: float = 0.1
    score: str = "output_norm"
    first: int = 3
    age_weight: float = 0.25
    spatial_bonus: float = 0.0
    cell: int = 2
    layer_slope: float = 0.5
    step_slope: float = 0.0
    interval_slope: float = 0.0
    seed: int = 0
    grid: tuple[int, int] | None = None
    last_full: int | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    chosen: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def kind(self, step: int) -> str:
        if step < self.first or self.last_full is None:
            return "computed"
        gap = round(self.interval / (1 + self.interval_slope - 2 * self.interval_slope * step / self.steps))
        return "computed" if step - self.last_full >= max(gap, 1) else self.between(step - self.last_full)

    def between(self, since: int) -> str:
        return "partial"

    def __call__(self, model: FluxTransformer2DModel, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        kind = self.kind(step)
        self.kinds.append(kind)
        image, text = at.image, at.text
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for layer, block in enumerate(blocks):
            kept = self.kept.setdefault(layer, Kept())
            if kind == "reused":
                text, image = text + kept.residual[0], image + kept.residual[1]
                continue
            rows = None
            if kind == "partial":
                rows = self.choose(kept, step, layer, len(blocks), image.shape[0], image.shape[1])
                self.chosen[step, layer] = rows
            double = layer < len(model.transformer_blocks)
            after = (self.double if double else self.single)(block, kept, image, text, at, rows)
            kept.residual = (after[0] - text, after[1] - image)
            text, image = after
            if rows is None:
                kept.ages = [[step] * image.shape[1] for _ in range(image.shape[0])]
            else:
                for ages, picked in zip(kept.ages, rows, strict=True):
                    for token in picked:
                        ages[token] = step
        if kind == "computed":
            self.last_full = step
            self.learn(image)
        return image, kind == "computed", 0.0

    def double(self, block: Any, kept: Kept, image: Tensor, text: Tensor, at: Embedded, rows: Any) -> Any:
        normed, gate, shift, scale, gate_ff = block.norm1(image, emb=at.temb)
        text_normed, text_gate, text_shift, text_scale, text_gate_ff = block.norm1_context(text, emb=at.temb)
        if rows is None:
            mixed, weights, value = attend(block.attn, normed, text_normed, at.rotary)
            words = text.shape[1]
            given = block.attn.to_out[0](mixed[:, words:])
            kept.attention = (given, block.attn.to_add_out(mixed[:, :words]))
            kept.score = self.base(given, weights, value, words)
        image = image + gate[:, None] * kept.attention[0]
        text = text + text_gate[:, None] * kept.attention[1]
        fed = block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
        kept.fed = fed if rows is None else self.update(kept.fed, fed, rows)
        if rows is None:
            kept.text_fed = block.ff_context(
                block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
            )
        return text + text_gate_ff[:, None] * kept.text_fed, image + gate_ff[:, None] * kept.fed

    def single(self, block: Any, kept: Kept, image: Tensor, text: Tensor, at: Embedded, rows: Any) -> Any:
        words = text.shape[1]
        joined = torch.cat([text, image], 1)
        normed, gate = block.norm(joined, emb=at.temb)
        if rows is None:
            kept.attention, weights, value = attend(block.attn, normed, None, at.rotary)
            kept.score = self.base(kept.attention[:, words:], weights, value, words)
        fed = block.proj_out(torch.cat([kept.attention, block.act_mlp(block.proj_mlp(normed))], 2))
        if rows is None:
            kept.fed = fed
        else:
            kept.fed = torch.cat([kept.fed[:, :words], self.update(kept.fed[:, words:], fed[:, words:], rows)], 1)
        joined = joined + gate[:, None] * kept.fed
        return joined[:, :words], joined[:, words:]

    def base(self, given: Tensor, weights: Tensor, value: Tensor, words: int) -> Tensor:
        """The score of the image's tokens [B, N] that attention gives."""
        if self.score == "output_norm":
            raw = (given**2).sum(2).sqrt()
        elif self.score == "value_norm":
            raw = (value[:, words:] ** 2).sum((2, 3)).sqrt()
        elif self.score == "attention":
            raw = weights.mean(1)[:, words:, words:].sum(1)
        elif self.score == "text":
            to_text = weights.mean(1)[:, words:, :words]
            to_text = to_text / to_text.sum(2, keepdim=True)
            return 1 + (to_text * to_text.log()).sum(2)
        else:
            return torch.zeros(given.shape[:2])
        return raw / (raw**2).sum(1, keepdim=True).sqrt()

    def choose(self, kept: Kept, step: int, layer: int, layers: int, batch: int, tokens: int) -> list[list[int]]:
        base = kept.score
        if self.score == "random":
            base = torch.rand(1, tokens, generator=self.generator).expand(batch, -1)
        share = self.ratio * (1 + self.layer_slope - 2 * self.layer_slope * layer / layers)
        share *= 1 + self.step_slope - 2 * self.step_slope * step / self.steps
        count = round(tokens * min(max(share, 0), 1))
        rows = []
        for number in range(batch):
            scores = [
                float(base[number, i]) + self.age_weight * (step - kept.ages[number][i]) / self.interval
                for i in range(tokens)
            ]
            if self.spatial_bonus:
                scores = self.with_bonus(scores)
            rows.append(sorted(range(tokens), key=lambda i: (-scores[i], i))[:count])
        return rows

    def with_bonus(self, scores: list[float]) -> list[float]:
        height, width = self.grid
        raised = list(scores)
        for top in range(0, height, self.cell):
            for left in range(0, width, self.cell):
                patch = [
                    row * width + column
                    for row in range(top, min(top + self.cell, height))
                    for column in range(left, min(left + self.cell, width))
                ]
                best = max(scores[i] for i in patch)
                for i in patch:
                    if scores[i] == best:
                        raised[i] += self.spatial_bonus * best
        return raised

    def update(self, kept: Tensor, fresh: Tensor, rows: list[list[int]]) -> Tensor:
        mixed = kept.clone()
        for number, picked in enumerate(rows):
            for token in picked:
                mixed[number, token] = fresh[number, token]
        return mixed

    def learn(self, image: Tensor) -> None:
        pass


@dataclass
class DuCaReference(ToCaReference):
    """Reused and partial steps by turns."""

    score: str = "random"
    age_weight: float = 0.0
    layer_slope: float = 0.0

    def between(self, since: int) -> str:
        return "reused" if since % 2 == 1 else "partial"


@dataclass
class ClusCaReference(ToCaReference):
    """One token a cluster; the others move towards what their cluster's gave."""

    clusters: int = 16
    gamma: float = 0.005
    iterations: int = 10
    centroids: list[Tensor] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)

    def learn(self, image: Tensor) -> None:
        """K-means in the L1 norm, image by image."""
        count = min(self.clusters, image.shape[1])
        if not self.centroids:
            order = torch.rand(1, image.shape[1], generator=self.generator)[0].argsort()[:count]
            self.centroids = [tokens[order].clone() for tokens in image]
        self.members = []
        for number, tokens in enumerate(image):
            centroids = self.centroids[number]
            members = nearest(tokens, centroids)
            for _ in range(self.iterations):
                for cluster in range(count):
                    own = [i for i, member in enumerate(members) if member == cluster]
                    if own:
                        centroids[cluster] = tokens[own].mean(0)
                before, members = members, nearest(tokens, centroids)
                if before == members:
                    break
            self.members.append(members)

    def choose(self, kept: Kept, step: int, layer: int, layers: int, batch: int, tokens: int) -> list[list[int]]:
        draw = torch.rand(1, tokens, generator=self.generator)[0].tolist()
        rows = []
        for members in self.members:
            groups = [[i for i in range(tokens) if members[i] == c] for c in range(min(self.clusters, tokens))]
            rows.append([max(group, key=lambda i: draw[i]) if group else 0 for group in groups])
        return rows

    def update(self, kept: Tensor, fresh: Tensor, rows: list[list[int]]) -> Tensor:
        mixed = kept.clone()
        for number, (picked, members) in enumerate(zip(rows, self.members, strict=True)):
            for cluster in set(members):
                spoken = [fresh[number, i] for i in sorted(set(picked)) if members[i] == cluster]
                mean = torch.stack(spoken).mean(0)
                for token in range(len(members)):
                    if members[token] == cluster:
                        mixed[number, token] = self.gamma * mean + (1 - self.gamma) * kept[number, token]
            for token in picked:
                mixed[number, token] = fresh[number, token]
        return mixed


def nearest(tokens: Tensor, centroids: Tensor) -> list[int]:
    """The centroid nearest to each token in the L1 norm, the first among equals."""
    return [int((centroids - token).abs().sum(1).argmin()) for token in tokens]
