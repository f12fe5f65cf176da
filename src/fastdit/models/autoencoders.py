"""How latent frames are decoded and encoded: what autoencoders' latents are scaled and shifted by."""

from __future__ import annotations

from enum import Enum

import torch

from fastdit.models.family import Autoencoder
from fastdit.structure import structural_twin


class Coding(Enum):
    """What an autoencoder is asked for amid a run."""

    DECODE = "pixels of latents"
    ENCODE = "latents of pixels"


def at_hand(vae: Autoencoder) -> Autoencoder:
    """Give an autoencoder to be called amid a run, on its weights.

    Where whole models are offloaded, a call of it would send the transformer away and the next step bring it back. So
    it comes beside the transformer, and stays there for the picture at the end, as after a call of its own.
    """
    hook = vae.__dict__.get("_hf_hook")
    if not hasattr(hook, "prev_module_hook"):
        return vae
    vae.to(hook.execution_device)
    return structural_twin(vae, {})


def decoded(vae: Autoencoder, frames: torch.Tensor) -> torch.Tensor:
    """Decode latent frames with an autoencoder whose latents are scaled and, in most, shifted."""
    scaled = frames / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    pixels: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return pixels


def encoded(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels to latent frames: the undoing of `decoded`. Distributions give their mode, so nothing is drawn."""
    made = vae.encode(pixels.to(vae.dtype))
    if hasattr(made, "latent_dist"):
        latents: torch.Tensor = made.latent_dist.mode()
    else:
        latents = made.latents if hasattr(made, "latents") else made.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: torch.Tensor = (latents - shift) * vae.config.scaling_factor
    return scaled


def decoded_planes(vae: Autoencoder, planes: torch.Tensor) -> torch.Tensor:
    """Decode latents [B, C, F, h, w], normalised channel by channel, with an autoencoder of videos."""
    deviation, mean = _statistics(vae, planes)
    pixels: torch.Tensor = vae.decode((planes * deviation + mean).to(vae.dtype), return_dict=False)[0]
    return pixels


def encoded_planes(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Undo `decoded_planes`."""
    latents: torch.Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    deviation, mean = _statistics(vae, latents)
    return (latents - mean) / deviation


def _statistics(vae: Autoencoder, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the deviation and the mean of the latent channels, [1, C or 1, 1, 1, 1]."""
    if getattr(vae.config, "latents_mean", None) is None:
        return like.new_tensor(1.0 / vae.config.scaling_factor), like.new_tensor(0.0)
    deviation, mean = (
        like.new_tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_std", "latents_mean")
    )
    return deviation, mean
