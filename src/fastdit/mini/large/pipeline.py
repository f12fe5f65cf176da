"""FluxPipeline with the defaults of the larger embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdit.errors import UnsupportedModel
from fastdit.mini import parts, pipeline_flux
from fastdit.mini.pipeline_flux import MiniFluxPipeline

if TYPE_CHECKING:
    from diffusers.pipelines.flux import FluxPipelineOutput

NAME = "fastdit-mini-512"
WEIGHTS = Path(__file__).parent / "weights"
_SIDE = 64


class LargeMiniFluxPipeline(MiniFluxPipeline):
    """FluxPipeline whose calls default to 512 x 512 pixels, and to this model's prompt length and guidance."""

    vocabulary_at = "fastdit.mini.large.scenes.vocabulary()"
    example = "a small apple on the left on wood"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: object,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        max_sequence_length: int = 12,
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


def load(*, torch_dtype: torch.dtype | None = None, directory: Path = WEIGHTS) -> LargeMiniFluxPipeline:
    """Load the pipeline's parts from a directory, without a network. Raises `UnsupportedModel` where there are none."""
    if not (directory / "transformer").is_dir():
        raise UnsupportedModel(
            "the larger embedded model is no part of this version, since it is not trained to its end; take "
            "load_mini() or load_mini('sd3'), or train it by the recipe in the repository's benchmarks/training/large"
        )
    pipeline = pipeline_flux.assemble(LargeMiniFluxPipeline, directory, torch_dtype or torch.float32)
    pipeline.default_sample_size = _SIDE
    parts.finish(pipeline, NAME)
    return pipeline
