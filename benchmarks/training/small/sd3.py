"""The SD3 transformer: six and a half million parameters, taught by the FLUX transformer.

The student regresses the teacher's velocity at a guidance of 1, for a prompt or for none, at the same noisy latents.
Unlike noise - x0 that target is the same whenever the same latents come by: less to average over, fewer samples to
learn from, and each can be learned from several times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from torch.nn import functional

from fastdit.mini.pipeline_sd3 import load_text
from fastdit.models.flux import FLUX
from training.small import text, transformer
from training.small.data import (
    Embedded,
    Prompts,
    Size,
    Store,
    sometimes_empty,
    stratified_sigmas,
)
from training.small.fit import fit, start_as_identity
from training.small.stage import Stage

_WIDTH = 192
_AVERAGING = 0.998
_LESSONS = {128: 12288, 256: 6144}
_FIRST_LESSONS = 8  # batches of them, before the first step
_REUSES = 3

SIZES = (Size(128, 36, (0.65, 0.25), 6144, 3, 2.4), Size(256, 18, (0.35, 0.75), 3072, 2, 2.4))
_LATE = 0.35


def build() -> SD3Transformer2DModel:
    """Make an untrained transformer whose blocks start as the identity."""
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=5,
        attention_head_dim=64,
        num_attention_heads=_WIDTH // 64,
        joint_attention_dim=text.WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * text.WIDTH,
        out_channels=16,
        pos_embed_max_size=48,
        qk_norm="rms_norm",
    )
    model.pos_embed.proj = _PatchProjection(16, _WIDTH, kernel_size=2, stride=2)
    start_as_identity(model)
    return model


class _PatchProjection(nn.Conv2d):
    """The patch embedding's convolution as a matrix product: on a CPU, bfloat16 convolutions are slow backwards."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches = functional.pixel_unshuffle(latents, 2).permute(0, 2, 3, 1)
        return functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Lessons:
    """A ring of noisy latents with what the teacher says of them; each is drawn a few times before it is replaced."""

    def __init__(self, store: Store, teacher: FluxTransformer2DModel, prompts: Prompts, seed: int) -> None:
        self.size = store.size
        self._store, self._teacher, self._prompts = store, teacher, prompts
        self._random = np.random.default_rng(seed)
        count = _LESSONS[self.size.pixels]
        self._noisy = torch.empty(count, 16, 2 * self.size.side, 2 * self.size.side)
        self._velocity = torch.empty_like(self._noisy)
        self._sigma = torch.empty(count)
        self._words = [""] * count
        self._filled = self._next = 0
        for _ in range(_FIRST_LESSONS):
            self._add(self.size.batch)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Give noisy latents [B, 16, h, w], their sigmas [B], the teacher's velocity and the prompts."""
        self._store.add(self.size.fresh)
        self._add(self.size.batch // _REUSES)
        chosen = self._random.integers(0, self._filled, self.size.batch)
        index = torch.from_numpy(chosen)
        return self._noisy[index], self._sigma[index], self._velocity[index], [self._words[i] for i in chosen]

    def _add(self, count: int) -> None:
        clean, words = self._store.draw(count)
        words = sometimes_empty(words, self._random)
        sigma = stratified_sigmas(count, self.size.shift)
        noisy = torch.lerp(clean, torch.randn_like(clean), sigma[:, None, None])
        with torch.no_grad():
            embedded = self._prompts.embed(words)
            velocity = transformer.forward(self._teacher, noisy, sigma, torch.ones(count), embedded, self.size.side)
        places = [(self._next + i) % len(self._words) for i in range(count)]
        side = self.size.side
        self._noisy[places] = FLUX.unpack(noisy, side, side)
        self._velocity[places] = FLUX.unpack(velocity, side, side)
        self._sigma[places] = sigma
        for place, word in zip(places, words, strict=True):
            self._words[place] = word
        self._next = (self._next + count) % len(self._words)
        self._filled = min(self._filled + count, len(self._words))


def forward(model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, prompt: Embedded) -> torch.Tensor:
    """Predict the velocity [B, 16, h, w] as the pipeline would have it predicted."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity: torch.Tensor = model(
            hidden_states=latents,
            timestep=1000.0 * sigma,
            pooled_projections=prompt[0],
            encoder_hidden_states=prompt[1],
            return_dict=False,
        )[0]
    return velocity.float()


def train(directory: Path, minutes: float, *, go_on: bool = False) -> None:
    """Train for some minutes and save the averaged weights, now and then and at the end.

    Needs the autoencoder, the text encoders and the FLUX transformer. `go_on` starts from the saved weights, at the
    late mixture of sizes.
    """
    seed = 5 if go_on else 4
    torch.manual_seed(seed)
    vae = AutoencoderTiny.from_pretrained(directory / "vae").eval().to(memory_format=torch.channels_last)
    teacher = FluxTransformer2DModel.from_pretrained(directory / "transformer", torch_dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    asked = Prompts(text.encoder(directory))
    prompts = Prompts(_encoder(directory))
    lessons = [Lessons(Store(size, vae, 10 * seed + i), teacher, asked, seed + i) for i, size in enumerate(SIZES)]
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "sd3" / "scheduler")
    model = build()
    if go_on:
        model.load_state_dict(SD3Transformer2DModel.from_pretrained(directory / "sd3" / "transformer").state_dict())
    average = copy.deepcopy(model).requires_grad_(False)

    def loss_of(which: int) -> torch.Tensor:
        noisy, sigma, velocity, words = lessons[which].batch()
        return (forward(model, noisy, sigma, prompts.embed(words)) - velocity).square().mean()

    def save() -> None:
        rounded = copy.deepcopy(average).to(torch.bfloat16)
        # Rounded, the table of positions would no longer be one of sines and cosines.
        rounded.pos_embed.pos_embed = average.pos_embed.pos_embed
        rounded.save_pretrained(directory / "sd3" / "transformer")

    fit(
        Stage("sd3", directory, minutes),
        model,
        average,
        SIZES,
        loss_of,
        save,
        late=0.0 if go_on else _LATE,
        averaging=_AVERAGING,
    )


def _encoder(directory: Path) -> Callable[[list[str]], Embedded]:
    """Give the pipeline's own way from prompts to embeddings."""
    pipeline = StableDiffusion3Pipeline(
        transformer=None, scheduler=None, vae=None, **load_text(directory, torch.float32)
    )

    def encode(prompts: list[str]) -> Embedded:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=text.LENGTH
        )
        return pooled, tokens

    return encode
