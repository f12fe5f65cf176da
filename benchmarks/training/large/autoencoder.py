"""The autoencoder: an ordinary `AutoencoderTiny` of a factor of 8 into 16 channels, trained on windows of pictures.

Most windows are of pictures of 512 pixels, half of them at an object's edge. Latents are kept near unit variance, and
are decoded with a little noise on them, which makes a smooth space that a transformer learns easily. At half their size
they must mean the half-size picture, so that the space bears resampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from training.large import checkpoint
from training.large.render import Picture, pack, random_pictures, render
from training.large.run import Run, working_dtype
from training.small.optimizer import MuonWithAdamW

_WIDTH = 32
_BATCH = 8
_WINDOW = 96
#: Sizes of the pictures that windows are taken from, and how often.
_PICTURES = {512: 0.55, 256: 0.3, 128: 0.15}
_RATE = 3e-3
_LATENT_NOISE = 0.08
_AVERAGING = 0.998


def build() -> AutoencoderTiny:
    """Make an untrained autoencoder; its full-resolution levels are nearly empty, for speed on a CPU."""
    return AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(_WIDTH,) * 4,
        decoder_block_out_channels=(_WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=(5, 4, 1, 0),
    )


def windows(pictures: list[Picture], pixels: int, random: np.random.Generator) -> Tensor:
    """Choose a window (left, top, extent) of `pixels` in each picture, half of them around the edge of an object."""
    chosen = []
    for picture in pictures:
        extent = pixels / int(random.choice(list(_PICTURES), p=list(_PICTURES.values())))
        left, top = random.uniform(0, max(0.0, 1 - extent), 2)
        if extent < 1 and random.random() < 0.5:
            object_ = picture.placements[int(random.integers(len(picture.placements)))]
            left, top = (
                float(np.clip(middle + random.uniform(-0.5, 0.5) * object_.size - extent / 2, 0, 1 - extent))
                for middle in (object_.x, object_.y)
            )
        chosen.append((left, top, min(extent, 1.0)))
    return torch.tensor(chosen, dtype=torch.float32)


def train(
    directory: Path,
    device: torch.device,
    minutes: float,
    *,
    cooldown: float = 0.0,
    ends: float | None = None,
    steps: int | None = None,
    decoder_only: bool = False,
) -> None:
    """Train for some minutes (or up to a number of steps), measure the latents, and save as ``directory/vae``.

    `decoder_only` leaves the encoder and its measures as they are, and with them every latent that a transformer has
    seen: the decoder can still learn, whatever was trained on the latents.
    """
    torch.manual_seed(0)
    name = "decoder" if decoder_only else "autoencoder"
    run = Run(name, directory, minutes, device, cooldown=cooldown, ends=ends, steps=steps)
    model = build()
    checkpoint.unpack(directory)
    if (directory / "vae").exists():
        model.load_state_dict(AutoencoderTiny.from_pretrained(directory / "vae").float().state_dict())
        if (numbers := checkpoint.numbers_of(run.name)) is not None:
            run.set_numbers(numbers)
            run.warm_from = run.step
    if decoder_only:
        model.encoder.requires_grad_(False)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = build().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    names = {name for name, parameter in model.named_parameters() if parameter.ndim == 4 and parameter.requires_grad}
    outer = {"encoder.layers.0.weight", *(name for name in names if model.get_parameter(name).shape[0] == 3)}
    optimizer = MuonWithAdamW(model, names - outer, lr=_RATE, dtype=working_dtype(device))
    if (state := run.resume(device)) is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        run.save(model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
        finish(average, directory, run, measure=not decoder_only)

    while not run.over:
        run.seed()
        random = run.random()
        pictures = random_pictures(_BATCH, random)
        images = render(pack(pictures, device), _WINDOW, windows(pictures, _WINDOW, random).to(device)) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=working_dtype(device) == torch.bfloat16):
            losses = _losses(model, images, shrink=run.step % 8 == 7)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(run.rate_factor(warmup_steps=100))
        with torch.no_grad():
            kept = min(_AVERAGING, (run.step + 1) / (run.step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - kept)
        run.step += 1
        run.samples += _BATCH
        if run.step % 100 == 1:
            run.log(**{name: value.item() for name, value in losses.items()})
        if run.wants_saving:
            save()
    save()


@torch.no_grad()
def finish(average: AutoencoderTiny, directory: Path, run: Run, *, measure: bool) -> None:
    """Log held-out quality and save the part, which shows `FluxPipeline` latents of zero mean and unit variance.

    Without `measure` the mean and the variance stay what they were.
    """
    device = next(average.parameters()).device
    plain = build().to(device).eval()
    plain.load_state_dict(average.state_dict())
    figures: dict[str, Any] = {}
    latents = []
    for pixels, count in ((128, 16), (256, 8), (512, 4)):
        images = held_out_images(count, pixels, device)
        encoded = plain.encode(images).latents
        latents.append(encoded.flatten())
        figures[f"psnr_{pixels}"] = psnr(plain.decode(encoded).sample, images).mean().item()
    if measure:
        every = torch.cat(latents)
        mean, scale = every.mean().item(), 1 / every.std().item()
    else:
        known = AutoencoderTiny.load_config(directory / "vae")
        mean, scale = known["shift_factor"], known["scaling_factor"]
    plain.register_to_config(shift_factor=mean, scaling_factor=scale)
    plain.save_pretrained(directory / "vae")
    run.log(**figures, mean=mean, deviation=1 / scale)


def held_out_images(count: int, pixels: int, device: torch.device) -> Tensor:
    """Give whole pictures of held-out prompts, [count, 3, pixels, pixels] in [-1, 1]; always the same ones."""
    pictures = random_pictures(count, np.random.default_rng(10_000), held_out=True)
    return render(pack(pictures, device), pixels) * 2 - 1


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB, over the range [-1, 1]."""
    error = (decoded.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def _losses(model: AutoencoderTiny, images: Tensor, *, shrink: bool) -> dict[str, Tensor]:
    latents = model.encode(images).latents.float()
    channels = latents.transpose(0, 1).flatten(1)
    moments = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
    if shrink:
        latents, images = functional.avg_pool2d(latents, 2), functional.avg_pool2d(images, 2)
    decoded = model.decode(latents + _LATENT_NOISE * torch.randn_like(latents)).sample.float()
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return {
        "absolute": error.abs().mean(),
        "edges": 0.5 * edges,
        "square": error.square().mean(),
        "moments": 0.1 * moments,
    }
