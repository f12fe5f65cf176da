"""What the embedded pipelines share: where their files lie, the autoencoder, the text encoders, quiet loading."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

WEIGHTS = Path(__file__).parent / "weights"
#: Without a network, whatever a directory lacks.
LOCAL: dict[str, Any] = {"local_files_only": True}


def load_autoencoder(directory: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """Load the autoencoder, f8 into 16 channels, with its channels last: so laid out, a CPU's kernels are faster."""
    autoencoder = AutoencoderTiny.from_pretrained(directory / "vae", torch_dtype=dtype, **LOCAL)
    return autoencoder.to(memory_format=torch.channels_last)


def load_clip(directory: Path, dtype: torch.dtype) -> CLIPTextModel:
    """Load the encoder whose pooled output says what a prompt asks for."""
    return CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=dtype, **LOCAL)


def load_t5(directory: Path, dtype: torch.dtype) -> T5EncoderModel:
    """Load the encoder of a prompt's tokens."""
    return T5EncoderModel.from_pretrained(directory / "text_encoder_2", dtype=dtype, **LOCAL)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of all encoders: whole words, 16 of them at most."""
    return PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer", **LOCAL)


def finish(pipeline: DiffusionPipeline, name: str) -> None:
    """Set every part to evaluation, and name the weights for accelerators that were calibrated on them."""
    pipeline.transformer.register_to_config(_name_or_path=name)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()


@contextmanager
def quiet() -> Iterator[None]:
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
