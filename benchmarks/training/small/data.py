"""What a transformer is trained on: rendered pictures as latents, and embedded prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny

from fastdit.models.flux import FLUX
from training.small.render import random_batch

#: A batch of embedded prompts: pooled [B, P] and by token [B, L, W].
Embedded = tuple[torch.Tensor, torch.Tensor]

_EMPTY_SHARE = 0.1


@dataclass(frozen=True)
class Size:
    """A picture size in training: its share of the steps early and late, its batch, its store of encoded pictures."""

    pixels: int
    batch: int
    shares: tuple[float, float]
    stored: int
    fresh: int
    shift: float

    @property
    def side(self) -> int:
        return self.pixels // 16


class Prompts:
    """Embeddings of prompts, computed once each."""

    def __init__(self, encode: Callable[[list[str]], Embedded]) -> None:
        self._encode = encode
        self._known: dict[str, Embedded] = {}

    def embed(self, prompts: list[str]) -> Embedded:
        """Give the pooled [B, P] and the token embeddings [B, L, W]."""
        if unknown := sorted({prompt for prompt in prompts if prompt not in self._known}):
            with torch.no_grad():
                pooled, tokens = self._encode(unknown)
            self._known.update(zip(unknown, zip(pooled, tokens, strict=True), strict=True))
        found = [self._known[prompt] for prompt in prompts]
        return torch.stack([pooled for pooled, _ in found]), torch.stack([tokens for _, tokens in found])


class Store:
    """A ring of encoded pictures with their prompts; a few are drawn anew at every step."""

    def __init__(self, size: Size, vae: AutoencoderTiny, seed: int) -> None:
        self.size = size
        self._vae = vae
        self._random = np.random.default_rng(seed)
        self._latents = torch.empty(size.stored, size.side**2, 64)
        self._prompts = [""] * size.stored
        self._filled = self._next = 0
        for _ in range(size.stored // 4 // 64):
            self.add(64)

    def add(self, count: int) -> None:
        """Render and encode `count` pictures into the ring."""
        drawn, pixels = random_batch(count, self.size.pixels, self._random)
        target = torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2.0 - 1.0
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            latents = self._vae.encode(target.contiguous(memory_format=torch.channels_last)).latents.float()
        latents = (latents - self._vae.config.shift_factor) * self._vae.config.scaling_factor
        for picture, tokens in zip(drawn, FLUX.pack(latents.contiguous()), strict=True):
            self._latents[self._next] = tokens
            self._prompts[self._next] = picture.scene.prompt()
            self._next = (self._next + 1) % self.size.stored
            self._filled = min(self._filled + 1, self.size.stored)

    def draw(self, count: int) -> tuple[torch.Tensor, list[str]]:
        """Draw clean latents [B, N, 64] and prompts."""
        chosen = self._random.integers(0, self._filled, count)
        return self._latents[torch.from_numpy(chosen)], [self._prompts[index] for index in chosen]


def sometimes_empty(prompts: list[str], random: np.random.Generator) -> list[str]:
    """Replace one prompt in ten by the empty one, which guidance starts from."""
    return ["" if random.random() < _EMPTY_SHARE else prompt for prompt in prompts]


def stratified_sigmas(count: int, shift: float) -> torch.Tensor:
    """Draw noise levels [B], one from each of B equal parts of (0, 1), and shift them as a scheduler does."""
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    return shift * uniform / (1.0 + (shift - 1.0) * uniform)
