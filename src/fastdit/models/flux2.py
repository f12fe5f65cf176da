"""FLUX.2: packed tokens whose position ids have four axes, the row and the column being the second and the third."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.models.family import Arguments, Autoencoder, Pipeline
from fastdit.models.packed import PackedFamily


@dataclasses.dataclass(frozen=True)
class Flux2Family(PackedFamily):
    """Tokens of FLUX.2: 128 channels = 32 latent channels x 2 x 2 pixels, normalised one by one.

    So a token is one pixel of the frames here; the tokens of pictures that are edited are appended.
    """

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        if arguments.get("image") is not None and not (arguments.get("height") and arguments.get("width")):
            return "image= without height= and width= leaves the size to the picture; give both"
        return super().refusal(pipeline, arguments)


def decoded_tokens(vae: Autoencoder, frames: torch.Tensor, epsilon: float | None = None) -> torch.Tensor:
    """Decode frames of normalised tokens. `epsilon` is added to the variance, where it isn't the autoencoder's own."""
    mean, deviation = _statistics(vae, epsilon)
    latents = nn.functional.pixel_shuffle(frames * deviation + mean, 2)
    pixels: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pixels


def encoded_tokens(vae: Autoencoder, pixels: torch.Tensor, epsilon: float | None = None) -> torch.Tensor:
    """Undo `decoded_tokens`."""
    latents = nn.functional.pixel_unshuffle(vae.encode(pixels.to(vae.dtype)).latent_dist.mode(), 2)
    mean, deviation = _statistics(vae, epsilon)
    return (latents - mean) / deviation


def _statistics(vae: Autoencoder, epsilon: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the mean and the deviation of every channel of a token, [1, C, 1, 1]."""
    mean, variance = (statistic.view(1, -1, 1, 1) for statistic in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + (vae.config.batch_norm_eps if epsilon is None else epsilon))


FLUX2 = Flux2Family(
    "FLUX.2",
    ("Flux2Pipeline", "Flux2KleinPipeline"),
    patch=1,
    axes=4,
    unpacking="_unpack_latents_with_ids",
    refused=(),
    decoding=decoded_tokens,
    encoding=encoded_tokens,
)
FAMILIES = (FLUX2,)
