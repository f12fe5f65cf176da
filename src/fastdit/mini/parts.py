"""What the embedded pipelines share: where their files lie, the autoencoder, the text encoders, quiet loading."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from fastdit.errors import FastditWarning, UnsupportedModel
from fastdit.process import switching, undoing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = Path(__file__).parent / "weights"
#: Without a network, whatever a directory lacks.
LOCAL: dict[str, bool] = {"local_files_only": True}


def load_autoencoder(directory: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """Load the autoencoder, f8 into 16 channels, with its channels last: so laid out, a CPU's kernels are faster."""
    autoencoder = AutoencoderTiny.from_pretrained(directory / "vae", torch_dtype=dtype, **LOCAL)
    return autoencoder.to(memory_format=torch.channels_last)


def load_clip(directory: Path, dtype: torch.dtype) -> CLIPTextModel:
    """Load the encoder whose pooled output says what a prompt asks for."""
    return _complete(CLIPTextModel, directory / "text_encoder", dtype)


def load_t5(directory: Path, dtype: torch.dtype) -> T5EncoderModel:
    """Load the encoder of a prompt's tokens."""
    return _complete(T5EncoderModel, directory / "text_encoder_2", dtype)


def _complete(cls: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load an encoder. Raises `UnsupportedModel` where weights are missing, which would be drawn at random."""
    encoder, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **LOCAL)
    if lost := [*found["missing_keys"], *found["unexpected_keys"]]:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} doesn't know {len(lost)} weights of {cls.__name__} in {folder} "
            f"by the names they were saved under, such as {lost[0]}; install a version that fastdit asks for"
        )
    return encoder


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of all encoders: whole words, 16 of them at most."""
    return PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer", **LOCAL)


class WordsRemarked:
    """What the embedded pipelines do before they encode a prompt: say which of its words the model does not know."""

    tokenizer: PreTrainedTokenizerFast
    vocabulary_at = "fastdit.mini.prompts.vocabulary()"
    example = "a small apple on a blue background"

    def encode_prompt(self, prompt: object, *args: object, **kwargs: object) -> object:
        """Encode prompts as the pipeline's class does. Warns (`FastditWarning`) of words outside of the vocabulary."""
        given = [prompt, *(value for name, value in kwargs.items() if "prompt" in name)]
        texts = [text for value in given for text in (value if isinstance(value, list | tuple) else [value])]
        words = re.findall(r"\w+|[^\w\s]+", " ".join(text.lower() for text in texts if isinstance(text, str)))
        if unknown := sorted(set(words) - self.tokenizer.get_vocab().keys()):
            warnings.warn(
                f"the embedded model does not know {', '.join(map(repr, unknown))} and reads nothing there; write in "
                f"the words of {self.vocabulary_at}, such as {self.example!r}",
                FastditWarning,
                stacklevel=3,
            )
        return super().encode_prompt(prompt, *args, **kwargs)  # type: ignore[misc]


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

    loggings = diffusers_logging, transformers_logging
    with switching():
        before = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in loggings]

        def restore() -> None:
            for one, level, bar in before:
                one.set_verbosity(level)
                if bar:
                    one.enable_progress_bar()

        with undoing(restore):
            for one in loggings:
                one.set_verbosity(logging.ERROR)
                one.disable_progress_bar()
            yield
