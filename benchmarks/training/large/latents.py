"""Encoded pictures to train a transformer on: drawn anew for every block of steps, by the block's number alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, FluxPipeline
from torch import Tensor
from torch.nn import functional

from training.large.render import coverage, pack, random_pictures, render
from training.large.run import Run, working_dtype

#: Steps for which a pool of pictures is kept.
BLOCK = 100
#: How often a picture of a pool is seen, on average, each time with other noise.
_USES = 2
_CHUNK = 16
#: Samples of a token's coverage along each axis.
_COVERAGE_SAMPLES = 4


@dataclass(frozen=True)
class Size:
    """A picture size in training: its batch, and the shift of the noise levels that its sampler has."""

    pixels: int
    batch: int
    shift: float

    @property
    def side(self) -> int:
        """Tokens along a side."""
        return self.pixels // 16


class Pool:
    """The encoded pictures of one size and their prompts, those of the current block of steps."""

    def __init__(self, size: Size, vae: AutoencoderTiny, device: torch.device) -> None:
        self.size = size
        self._vae = vae
        self._device = device
        self._block = -1
        self._latents = torch.empty(0)
        self._objects = torch.empty(0)
        self._prompts: list[str] = []

    def draw(self, run: Run, share: float) -> tuple[Tensor, Tensor, list[str]]:
        """Give this step's clean latents [B, N, 64], the share of each token that objects cover [B, N], and prompts.

        `share` is the size's share of the steps.
        """
        if run.step // BLOCK != self._block:
            self._fill(run.step // BLOCK, max(self.size.batch, int(BLOCK * share * self.size.batch / _USES)))
        chosen = run.random(stream=self.size.pixels).integers(0, len(self._prompts), self.size.batch)
        rows = torch.from_numpy(chosen).to(self._device)
        return self._latents[rows], self._objects[rows], [self._prompts[index] for index in chosen]

    def _fill(self, block: int, count: int) -> None:
        pictures = random_pictures(count, Run.generator(self.size.pixels + 1, block))
        encoded, covered = [], []
        for start in range(0, count, _CHUNK):
            batch = pack(pictures[start : start + _CHUNK], self._device)
            encoded.append(encode(self._vae, render(batch, self.size.pixels) * 2 - 1))
            objects = coverage(batch, self.size.side * _COVERAGE_SAMPLES)
            covered.append(functional.avg_pool2d(objects, _COVERAGE_SAMPLES).flatten(1))
        self._latents, self._objects = torch.cat(encoded), torch.cat(covered)
        self._prompts = [picture.scene.prompt() for picture in pictures]
        self._block = block


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    """Give the packed latents [B, N, 64] of pictures in [-1, 1], scaled as a pipeline has them."""
    device, dtype = images.device, working_dtype(images.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latents.float()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
    return packed
