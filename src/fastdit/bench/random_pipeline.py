"""Pipelines of published models with random weights, at a share of their size: nothing is downloaded.

Their pictures are noise, and their seconds, memory and engines are those of the real architecture. A prompt becomes
embeddings that its text seeds, in the place of text encoders.
"""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from fastdit.errors import InvalidConfig
from fastdit.predict.architectures import published

#: The published models that are made so.
MODELS = ("flux-dev", "flux-schnell")


def parsed(name: str) -> tuple[str, float]:
    """Read `random:flux-dev@0.1`: the model, and its share of the parameters. Raises `InvalidConfig` for others."""
    found = re.fullmatch(r"random:([a-z0-9-]+)(?:@(\d*\.?\d+))?", name)
    share = float(found[2] or 1.0) if found else 0.0
    if found is None or found[1] not in MODELS or not 0.0 < share <= 1.0:
        raise InvalidConfig(
            f"random pipelines are random:MODEL or random:MODEL@SHARE, of {' and '.join(MODELS)}, with a share of the "
            f"parameters above 0 and up to 1, got {name!r}"
        )
    return found[1], share


class RandomFluxPipeline(FluxPipeline):  # type: ignore[misc]
    """FluxPipeline without text encoders: a prompt's text seeds its embeddings."""

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        *args: object,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 512,
        **given: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the embeddings of prompts [B, T, C], pooled ones [B, C], and the ids of the text tokens [T, 3]."""
        config, place = self.transformer.config, {"device": device, "dtype": self.transformer.dtype}
        prompt_embeds, pooled_prompt_embeds = given.get("prompt_embeds"), given.get("pooled_prompt_embeds")
        if prompt_embeds is None or pooled_prompt_embeds is None:
            texts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
            seeds = [zlib.crc32(text.encode()) for text in texts]
            prompt_embeds = _drawn(seeds, (max_sequence_length, config.joint_attention_dim))
            pooled_prompt_embeds = _drawn(seeds, (config.pooled_projection_dim,))
        embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0).to(**place)
        pooled = pooled_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0).to(**place)
        return embeds, pooled, torch.zeros(embeds.shape[1], 3, dtype=embeds.dtype, device=embeds.device)


def _drawn(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([_noise(shape, seed) for seed in seeds])


def _noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def load_random(name: str, dtype: torch.dtype | None = None) -> Any:
    """Build a random pipeline, always with the same weights: depth and heads go with the cube root of the share.

    Raises as `parsed`.
    """
    model, share = parsed(name)
    parameters = inspect.signature(FluxTransformer2DModel.__init__).parameters
    root = share ** (1 / 3)
    scaled = {
        field: max(round(parameters[field].default * root), 1)
        for field in ("num_layers", "num_single_layers", "num_attention_heads")
    }
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype or torch.float32)
        try:
            transformer = FluxTransformer2DModel(**{**published()["models"][model]["config"], **scaled})
            autoencoder = AutoencoderKL(**published()["autoencoders"]["flux"])
        finally:
            torch.set_default_dtype(before)
    return RandomFluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
