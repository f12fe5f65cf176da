"""The common loop on a tiny random FLUX: every configuration sees the same noise, and the record tells the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdit.measure.synthetic import random_call, random_flux

PROMPTS = ("one", "two", "three", "four")


class Pipeline:
    """A random FLUX that takes prompts: each becomes the embeddings of its own seed."""

    def __new__(cls) -> Any:
        pipeline = random_flux()

        def encode_prompt(prompt: Sequence[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            calls = [random_call(pipeline, image_tokens_per_side=4, seed=PROMPTS.index(text)) for text in prompt]
            embeddings = torch.cat([call["prompt_embeds"] for call in calls])
            return embeddings, torch.cat([call["pooled_prompt_embeds"] for call in calls]), torch.zeros(16, 3)

        pipeline.encode_prompt = encode_prompt
        return pipeline
