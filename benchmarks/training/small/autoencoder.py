"""Stage 1: the f8 autoencoder with 16 latent channels, an ordinary `AutoencoderTiny`.

The full-resolution level is nearly empty, for speed on a CPU. Latents are kept near unit variance by a penalty, and
are decoded with a little noise on them, which makes a smooth space that a diffusion model learns easily.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from training.small.optimizer import MuonWithAdamW
from training.small.render import random_batch
from training.small.stage import Stage

_BATCHES = {128: 8, 256: 2}
_LATENT_NOISE = 0.1
_WIDTH = 32


def build_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(_WIDTH,) * 4,
        decoder_block_out_channels=(_WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 3, 3),
        num_decoder_blocks=(3, 3, 1, 0),
    )


def train_autoencoder(directory: Path, minutes: float, seed: int = 0) -> AutoencoderTiny:
    """Train, measure the latents' mean and deviation, and save as ``directory/vae``."""
    torch.manual_seed(seed)
    stage = Stage("autoencoder", directory, minutes)
    autoencoder = build_autoencoder()
    autoencoder = autoencoder.to(memory_format=torch.channels_last).train()
    names = {name for name, parameter in autoencoder.named_parameters() if parameter.ndim == 4}
    ends = {"encoder.layers.0.weight", *(name for name in names if autoencoder.get_parameter(name).shape[0] == 3)}
    optimizer = MuonWithAdamW(autoencoder, names - ends, lr=3e-3)
    if (state := stage.resume()) is not None:
        autoencoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    random = np.random.default_rng(seed + stage.step)
    while stage.progress < 1:
        size = 256 if stage.step % 4 == 3 else 128
        images = sample_images(_BATCHES[size], size, random)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(autoencoder, images, shrink=stage.step % 8 == 7)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step(stage.lr_factor())
        stage.step += 1
        if stage.step % 100 == 1:
            stage.log(size=size, loss=loss.item())
        if stage.step % 4000 == 0:
            stage.save(model=autoencoder.state_dict(), optimizer=optimizer.state_dict())
    autoencoder.eval().to(memory_format=torch.contiguous_format)
    _set_latent_statistics(autoencoder)
    for size in _BATCHES:
        images = sample_images(32, size, np.random.default_rng(10_000), held_out=True)
        with torch.no_grad():
            stage.log(
                size=size,
                final_psnr=psnr(autoencoder.decode(autoencoder.encode(images).latents).sample, images).mean().item(),
            )
    autoencoder.save_pretrained(directory / "vae")
    return autoencoder


def sample_images(count: int, size: int, random: np.random.Generator, *, held_out: bool = False) -> Tensor:
    """Rendered pictures as the autoencoder takes them: [count, 3, size, size] in [-1, 1]."""
    pixels = random_batch(count, size, random, held_out=held_out)[1]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB, over the range [-1, 1]."""
    error = (decoded.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def _loss(autoencoder: AutoencoderTiny, images: Tensor, *, shrink: bool) -> Tensor:
    latents = autoencoder.encode(images).latents.float()
    channels = latents.transpose(0, 1).flatten(1)
    moments = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
    if shrink:
        # half-size latents must mean the half-size picture: the space then bears resampling, and is easier to learn
        latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
    decoded = autoencoder.decode(latents + _LATENT_NOISE * torch.randn_like(latents)).sample.float()
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss: Tensor = error.abs().mean() + 0.5 * edges + error.square().mean() + 0.1 * moments
    return loss


@torch.no_grad()
def _set_latent_statistics(autoencoder: AutoencoderTiny) -> None:
    """Have `FluxPipeline` see latents of zero mean and unit variance."""
    random = np.random.default_rng(1)
    latents = torch.cat([autoencoder.encode(sample_images(64, size, random)).latents.flatten() for size in _BATCHES])
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
