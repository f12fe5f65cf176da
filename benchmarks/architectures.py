"""Published architectures, as data: enough to count a run's FLOPs on the meta device, without any weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdit.predict.architectures import published

TransformerInputs = Callable[[Mapping[str, Any], int, int], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A text-to-image model: its transformer's class, how that is called, and every part's configuration.

    `text_tokens` are those of the T5 encoder, `clip_configs` the encoders beside it. With `guided` a step's forward
    has two rows, and both prompts are encoded. `steps` is the plain run that savings are told against, `presets` are
    those of RALU that were published for it.
    """

    transformer: str
    transformer_config: Mapping[str, Any]
    inputs: TransformerInputs
    text_encoder_config: Mapping[str, Any] = field(default_factory=lambda: T5_XXL)
    decoder_config: Mapping[str, Any] = field(default_factory=lambda: FLUX_AUTOENCODER)
    patch_pixels: int = 16
    text_tokens: int = 512
    clip_configs: tuple[Mapping[str, Any], ...] = ()
    guided: bool = False
    steps: int = 50
    presets: tuple[str, ...] = ("4x", "5x", "7x", "10x", "14x")

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture of this size in pixels."""
        return (height // self.patch_pixels) * (width // self.patch_pixels)

    def build_transformer(self) -> torch.nn.Module:
        """The transformer on the meta device."""
        import diffusers

        with torch.device("meta"):
            module: torch.nn.Module = getattr(diffusers, self.transformer)(**self.transformer_config)
        if (embed := getattr(module, "pos_embed", None)) is not None and "pos_embed" in embed._buffers:
            embed.pos_embed = None  # a table of one resolution; adding it is not counted
        return module.eval()


T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

CLIP_TOKENS = 77

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}

CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

FLUX_AUTOENCODER: dict[str, Any] = published()["autoencoders"]["flux"]


def _flux_inputs(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": torch.empty(1, image_tokens, config["in_channels"]),
        "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"]),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(image_tokens, 3),
        "txt_ids": torch.empty(text_tokens, 3),
    }
    return inputs | ({"guidance": torch.empty(1)} if config["guidance_embeds"] else {})


def _chroma_inputs(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, image_tokens, config["in_channels"]),
        "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(image_tokens, 3),
        "txt_ids": torch.empty(text_tokens, 3),
    }


def _sd3_inputs(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> dict[str, Any]:
    """Both rows of a guided step; the image is a strip of 1 x N patches, the text CLIP's tokens and T5's."""
    patch = config["patch_size"]
    return {
        "hidden_states": torch.empty(2, config["in_channels"], patch, patch * image_tokens),
        "encoder_hidden_states": torch.empty(2, CLIP_TOKENS + text_tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.empty(2, config["pooled_projection_dim"]),
        "timestep": torch.empty(2),
    }


_SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}

ARCHITECTURES: dict[str, Architecture] = {
    "flux-dev": Architecture("FluxTransformer2DModel", {"guidance_embeds": True}, _flux_inputs),
    "flux-schnell": Architecture("FluxTransformer2DModel", {}, _flux_inputs),
    "chroma": Architecture("ChromaTransformer2DModel", {}, _chroma_inputs),
    "sd3-medium": Architecture(
        "SD3Transformer2DModel",
        _SD3_MEDIUM,
        _sd3_inputs,
        text_tokens=256,
        clip_configs=(CLIP_L, CLIP_G),
        guided=True,
        steps=28,
        presets=("2x", "3x", "6x", "9x"),
    ),
}
