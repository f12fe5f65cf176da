"""Published architectures, as data: enough to count a run's FLOPs on the meta device, without any weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TransformerInputs = Callable[[Mapping[str, Any], int, int], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A text-to-image model: its transformer's class, how that is called, and every part's configuration."""

    transformer: str
    transformer_config: Mapping[str, Any]
    inputs: TransformerInputs
    text_encoder_config: Mapping[str, Any] = field(default_factory=lambda: T5_XXL)
    decoder_config: Mapping[str, Any] = field(default_factory=lambda: FLUX_AUTOENCODER)
    patch_pixels: int = 16

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture of this size in pixels."""
        return (height // self.patch_pixels) * (width // self.patch_pixels)

    def build_transformer(self) -> torch.nn.Module:
        """The transformer on the meta device."""
        import diffusers

        with torch.device("meta"):
            module: torch.nn.Module = getattr(diffusers, self.transformer)(**self.transformer_config)
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

FLUX_AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


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


ARCHITECTURES: dict[str, Architecture] = {
    "flux-dev": Architecture("FluxTransformer2DModel", {"guidance_embeds": True}, _flux_inputs),
    "flux-schnell": Architecture("FluxTransformer2DModel", {}, _flux_inputs),
    "chroma": Architecture("ChromaTransformer2DModel", {}, _chroma_inputs),
}
