"""FLUX.1-dev and Stable Diffusion 3 medium at their published sizes, with random weights: pipelines written as data.

Nothing is downloaded. Weights are made on the device itself, in the precision that they are run in, so that a model of
twelve billion parameters takes its 24 GB once and passes through no other memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from architectures import ARCHITECTURES, CLIP_TOKENS, Architecture


@dataclass(frozen=True)
class Published:
    """A model's pipeline without its text encoders: the call takes `text_tokens` embeddings in their place.

    `computed` is the share of steps that TeaCache computes of it, by its published times. `step_seconds` are those of
    a plain step that others published, by where they were measured.
    """

    pipeline: str
    architecture: Architecture
    absent: tuple[str, ...]
    text_tokens: int
    scheduler: dict[str, Any]
    decoder: dict[str, Any]
    guidance: float
    preset: str
    computed: float
    pixels: int = 1024
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)

    def smallest(self) -> Published:
        """The same pipeline thousands of times smaller, for trying a script out."""
        config = {**self.architecture.transformer_config, **self.tiny}
        decoder = {**self.architecture.decoder_config, "block_out_channels": (4,) * 4, "layers_per_block": 1}
        architecture = dataclasses.replace(
            self.architecture, transformer_config=config, decoder_config={**decoder, "norm_num_groups": 1}, steps=12
        )
        return dataclasses.replace(self, architecture=architecture, text_tokens=8, pixels=128)

    def build(self, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
        """Make the pipeline on a device."""
        import diffusers

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(seed)
                architecture = self.architecture
                transformer = getattr(diffusers, architecture.transformer)(**architecture.transformer_config)
                autoencoder = diffusers.AutoencoderKL(**{**architecture.decoder_config, **self.decoder})
        finally:
            torch.set_default_dtype(before)
        pipeline = getattr(diffusers, self.pipeline)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler),
            transformer=transformer.eval(),
            vae=autoencoder.eval(),
            **dict.fromkeys(self.absent),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def call(self, pipeline: Any, seed: int = 0, batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of one call, without its steps: random embeddings of prompts, and of empty ones."""
        config, generator = pipeline.transformer.config, torch.Generator().manual_seed(seed)
        shapes = {
            "prompt_embeds": (batch, self.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (batch, config.pooled_projection_dim),
        }
        if self.architecture.guided:
            shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
        place = pipeline.transformer.device, pipeline.transformer.dtype
        embeds = {name: torch.randn(shape, generator=generator).to(*place) for name, shape in shapes.items()}
        return {**embeds, "height": self.pixels, "width": self.pixels, "guidance_scale": self.guidance}


_TINY_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}

MODELS = {
    "flux-dev": Published(
        pipeline="FluxPipeline",
        architecture=ARCHITECTURES["flux-dev"],
        absent=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        text_tokens=512,
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
        decoder={"scaling_factor": 0.3611, "shift_factor": 0.1159},
        guidance=3.5,
        preset="4x",
        computed=0.58,
        step_seconds={"SGLang, H100": 0.12885},
        tiny={
            **_TINY_HEADS,
            "num_layers": 1,
            "num_single_layers": 2,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "sd3-medium": Published(
        pipeline="StableDiffusion3Pipeline",
        architecture=ARCHITECTURES["sd3-medium"],
        absent=tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
        text_tokens=CLIP_TOKENS + 256,
        scheduler={"shift": 3.0},
        decoder={"scaling_factor": 1.5305, "shift_factor": 0.0609},
        guidance=7.0,
        preset="2x",
        computed=0.69,
        tiny={**_TINY_HEADS, "num_layers": 3, "caption_projection_dim": 32, "pooled_projection_dim": 32},
    ),
}
