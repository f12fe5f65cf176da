"""StableDiffusion3Pipeline with the defaults of the embedded model.

Both CLIP places hold the embedded CLIP encoder, with an identity for a projection. The pipeline lays the two outputs
side by side and fits them to the T5's width, so that of the tokens the second copy falls away.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from fastdit.mini import parts

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAME = "fastdit-mini-sd3"


class MiniStableDiffusion3Pipeline(parts.WordsRemarked, StableDiffusion3Pipeline):  # type: ignore[misc]
    """StableDiffusion3Pipeline whose calls default to the embedded model's prompt length, guidance and 28 steps."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: object,
        num_inference_steps: int = 28,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 16,
        **kwargs: object,
    ) -> StableDiffusion3PipelineOutput | tuple[object, ...]:
        """Generate pictures; see `StableDiffusion3Pipeline`."""
        return super().__call__(
            prompt,
            *args,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            **kwargs,
        )


def load(*, torch_dtype: torch.dtype | None = None, directory: Path = parts.WEIGHTS) -> MiniStableDiffusion3Pipeline:
    """Load the pipeline's parts from a directory, without a network."""
    dtype = torch_dtype or torch.float32
    own = directory / "sd3"
    with parts.quiet():
        pipeline = MiniStableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler", **parts.LOCAL),
            vae=parts.load_autoencoder(directory, dtype),
            transformer=SD3Transformer2DModel.from_pretrained(own / "transformer", torch_dtype=dtype, **parts.LOCAL),
            **load_text(directory, dtype),
        )
    parts.finish(pipeline, NAME)
    return pipeline


def load_text(directory: Path, dtype: torch.dtype) -> dict[str, PreTrainedModel | PreTrainedTokenizerFast]:
    """Load the encoders and tokenizers of the pipeline's three places for text."""
    return {
        "text_encoder": _projecting_clip(directory, dtype),
        "tokenizer": parts.load_tokenizer(directory),
        "text_encoder_2": _projecting_clip(directory, dtype),
        "tokenizer_2": parts.load_tokenizer(directory),
        "text_encoder_3": parts.load_t5(directory, dtype),
        "tokenizer_3": parts.load_tokenizer(directory),
    }


def _projecting_clip(directory: Path, dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """Wrap the CLIP encoder in the class that SD3 takes; its projected output is the pooled output itself."""
    clip = parts.load_clip(directory, dtype)
    encoder = CLIPTextModelWithProjection(clip.config).to(dtype).requires_grad_(False)
    own = encoder.text_model.state_dict()
    # transformers before 5 has one more level inside CLIPTextModel.
    found = clip.state_dict()
    encoder.text_model.load_state_dict({name: found.get(name, found.get(f"text_model.{name}")) for name in own})
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder
