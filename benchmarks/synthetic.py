"""A FLUX pipeline of random weights in any size: real diffusers classes, nothing to download, for timings and tests.

It takes prompt embeddings, not prompts, so it carries no text encoders; its autoencoder is as small as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_TEXT_WIDTH, _POOLED_WIDTH = 64, 32
_PIXELS_PER_TOKEN = 16  # the autoencoder's factor of 8, and FLUX's patches of 2 x 2 latents


@dataclass(frozen=True)
class FluxSize:
    """The dimensions of a random FLUX; the defaults are for tests."""

    double_blocks: int = 2
    single_blocks: int = 2
    heads: int = 2
    head_width: int = 16


def random_flux(size: FluxSize | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A `FluxPipeline` with guidance embedding and random weights, its progress bar off."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    size = size or FluxSize()
    quarter = size.head_width // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            num_attention_heads=size.heads,
            attention_head_dim=size.head_width,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_POOLED_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(size.head_width // 2, quarter, quarter),
        )
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
        )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype=dtype)


def random_call(pipeline: Any, *, image_tokens_per_side: int, text_tokens: int = 16, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one call: a square picture of so many tokens a side, with random prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    dtype = pipeline.transformer.dtype
    return {
        "prompt_embeds": torch.randn(1, text_tokens, _TEXT_WIDTH, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, _POOLED_WIDTH, generator=generator).to(dtype),
        "height": image_tokens_per_side * _PIXELS_PER_TOKEN,
        "width": image_tokens_per_side * _PIXELS_PER_TOKEN,
    }
