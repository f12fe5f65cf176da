"""The attention of a mixed stage written out pair by pair, for FLUX: every pair of tokens has places of its own.

Nothing is turned beforehand. A pair's places are those of the query's resolution, and its logit is that of the query
and the key, turned against each other by the distance of these two places. It shares nothing with the package.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

Place = tuple[float, float]


def pair(query: str, query_place: Place, key: str, key_place: Place) -> tuple[Place, Place] | None:
    """The two places of a pair, given in the coarse frame, or None where the query does not see the key.

    Kinds are "text", "coarse", "fine".
    """
    if query == "fine":
        twice = (2 * query_place[0], 2 * query_place[1])
        return twice, key_place if key == "text" else (2 * key_place[0], 2 * key_place[1])
    if key == "fine" and any(side % 1 for side in key_place):
        return None
    return query_place, key_place


class PairByPair:
    """An attention processor of diffusers for one mixed layout; `kinds` and `places` are of the whole sequence.

    `added` is added to the logits, -inf where a query does not see a key.
    """

    def __init__(self, kinds: list[str], places: list[Place], widths: tuple[int, int, int], theta: float) -> None:
        frequencies = [theta ** (-2 * plane / width) for width in widths for plane in range(width // 2)]
        axes = [axis for axis, width in enumerate(widths) for _ in range(width // 2)]
        count = len(kinds)
        self.angles = torch.zeros(count, count, len(frequencies), dtype=torch.float64)
        self.added = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(count):
                found = pair(kinds[i], places[i], kinds[j], places[j])
                if found is None:
                    self.added[i, j] = -math.inf
                    continue
                distance = (0.0, found[0][0] - found[1][0], found[0][1] - found[1][1])
                for plane, (axis, frequency) in enumerate(zip(axes, frequencies, strict=True)):
                    self.angles[i, j, plane] = distance[axis] * frequency

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of queries, keys and values [B, S, H, D] that were not turned."""
        planes = [torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) for x in (query, key)]
        turns = torch.polar(torch.ones_like(self.angles), self.angles)
        logits = torch.einsum("bihd,bjhd,ijd->bhij", planes[0], planes[1].conj(), turns).real
        logits = logits / math.sqrt(query.shape[3]) + self.added
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(dim=-1), value.double()).to(query.dtype)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is None:
            return self.attend(query, key, value).flatten(2)
        text = encoder_hidden_states
        query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=1)
        key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=1)
        value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
        found = self.attend(query, key, value).flatten(2)
        words = text.shape[1]
        return attn.to_out[1](attn.to_out[0](found[:, words:])), attn.to_add_out(found[:, :words])


def mixed_transformer(
    transformer: FluxTransformer2DModel, words: int, places: list[Place], coarse_tokens: int
) -> FluxTransformer2DModel:
    """A copy of a transformer for one mixed layout of `places` in the coarse frame, the kept coarse tokens first."""
    kept = coarse_tokens - (len(places) - coarse_tokens) // 3
    kinds = ["text"] * words + ["coarse"] * kept + ["fine"] * (len(places) - kept)
    model = copy.deepcopy(transformer)
    processor = PairByPair(kinds, [(0.0, 0.0)] * words + places, tuple(model.config.axes_dims_rope), 10000.0)
    model.set_attn_processor(processor)
    return model
