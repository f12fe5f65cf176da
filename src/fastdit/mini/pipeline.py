"""FluxPipeline with the defaults of the embedded model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

NAME = "fastdit-mini"
_WEIGHTS = Path(__file__).parent / "weights"
_SIDE = 32


class MiniFluxPipeline(FluxPipeline):  # type: ignore[misc]
    """FluxPipeline whose calls default to the embedded model's size, prompt length, guidance and 50 steps."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 16,
        **kwargs: Any,
    ) -> Any:
        """Generate pictures; see `FluxPipeline`."""
        return super().__call__(
            prompt,
            *args,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            **kwargs,
        )


def load(*, torch_dtype: torch.dtype | None = None, directory: Path = _WEIGHTS) -> MiniFluxPipeline:
    """Load the pipeline's parts from a directory, without a network."""
    dtype = torch_dtype or torch.float32
    local: dict[str, Any] = {"local_files_only": True}
    with _quiet():
        vae = AutoencoderTiny.from_pretrained(directory / "vae", torch_dtype=dtype, **local)
        transformer = FluxTransformer2DModel.from_pretrained(directory / "transformer", torch_dtype=dtype, **local)
        pipeline = MiniFluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler", **local),
            vae=vae,
            text_encoder=CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=dtype, **local),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer", **local),
            text_encoder_2=T5EncoderModel.from_pretrained(directory / "text_encoder_2", dtype=dtype, **local),
            tokenizer_2=PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer", **local),
            transformer=transformer,
        )
    pipeline.default_sample_size = _SIDE
    # What identifies the weights to accelerators that were calibrated on them.
    transformer.register_to_config(_name_or_path=NAME)
    for module in (vae, transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval()
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the loaders' remarks and bars: a file of this package is not news to its user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    for module in (diffusers_logging, transformers_logging):
        module.set_verbosity(logging.ERROR)
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bar in zip((diffusers_logging, transformers_logging), before, bars, strict=True):
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()
