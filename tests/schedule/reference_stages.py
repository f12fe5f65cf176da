"""A whole-frame stage of FLUX written out: Euler steps of the plain transformer, for the tests of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def stage(pipe: Any, call: dict[str, Any], tokens: Tensor, side: int, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Give the tokens [1, side * side, C] at the last sigma, and the clean ones that the last step saw."""
    clean = tokens
    ids = torch.tensor([[0.0, row, column] for row in range(side) for column in range(side)])
    for now, following in pairwise(sigmas):
        velocity = pipe.transformer(
            hidden_states=tokens,
            timestep=torch.full((1,), now),
            guidance=torch.full((1,), call.get("guidance_scale", 3.5)),
            pooled_projections=call["pooled_prompt_embeds"],
            encoder_hidden_states=call["prompt_embeds"],
            txt_ids=torch.zeros(call["prompt_embeds"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        clean, tokens = tokens - now * velocity, tokens + (following - now) * velocity
    return tokens, clean
