"""FluxPipeline with the defaults of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from fastdit.mini import parts

if TYPE_CHECKING:
    from diffusers.pipelines.flux import FluxPipelineOutput

NAME = "fastdit-mini"
Pipeline = TypeVar("Pipeline", bound="MiniFluxPipeline")
_SIDE = 32


class MiniFluxPipeline(parts.WordsRemarked, FluxPipeline):  # type: ignore[misc]
    """FluxPipeline whose calls default to the embedded model's size, prompt length, guidance and 50 steps."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: object,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 16,
        **kwargs: object,
    ) -> FluxPipelineOutput | tuple[object, ...]:
        """Generate pictures; see `FluxPipeline`."""
        return super().__call__(
            prompt,
            *args,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            **kwargs,
        )


def load(*, torch_dtype: torch.dtype | None = None, directory: Path = parts.WEIGHTS) -> MiniFluxPipeline:
    """Load the pipeline's parts from a directory, without a network."""
    pipeline = assemble(MiniFluxPipeline, directory, torch_dtype or torch.float32)
    pipeline.default_sample_size = _SIDE
    parts.finish(pipeline, NAME)
    return pipeline


def assemble(kind: type[Pipeline], directory: Path, dtype: torch.dtype) -> Pipeline:
    """Make a pipeline of the parts in a directory."""
    with parts.quiet():
        return kind(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler", **parts.LOCAL),
            vae=parts.load_autoencoder(directory, dtype),
            text_encoder=parts.load_clip(directory, dtype),
            tokenizer=parts.load_tokenizer(directory),
            text_encoder_2=parts.load_t5(directory, dtype),
            tokenizer_2=parts.load_tokenizer(directory),
            transformer=FluxTransformer2DModel.from_pretrained(
                directory / "transformer", torch_dtype=dtype, **parts.LOCAL
            ),
        )
