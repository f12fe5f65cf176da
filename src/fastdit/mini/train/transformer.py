"""The denoiser: a FLUX transformer of nine million parameters, trained at 128 and 256 pixels with guidance built in.

Flow matching: x = (1 - sigma) x0 + sigma noise, target v = noise - x0. Guidance is learned as FLUX.1-dev has it, as an
input g. A part of every late batch draws g and moves its target by (g - 1)(v(prompt) - v("")), both from the averaged
weights at g = 1; where g = 1 the model is the plain conditional one, and one prompt in ten is empty.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from fastdit.mini.train import text
from fastdit.mini.train.optimizer import MuonWithAdamW
from fastdit.mini.train.render import random_batch
from fastdit.mini.train.stage import Stage
from fastdit.models.flux import FLUX

_EMPTY_SHARE = 0.1
_GUIDED_SHARE = 0.4
_GUIDANCE_RANGE = (1.0, 6.0)
_GUIDANCE_START = 0.71
_RATE = 2e-3
_AVERAGING = 0.999
_CHECKPOINT_STEPS = 250


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


SIZES = (Size(128, 64, (0.62, 0.30), 12288, 12, 1.6), Size(256, 24, (0.38, 0.70), 3072, 4, 2.4))
_LATE = 0.48


def build() -> FluxTransformer2DModel:
    """Make an untrained denoiser whose blocks start as the identity (modulation and output at zero)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for module in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make FLUX.1-dev's scheduler with its range of shifts laid over this model's token counts."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=64,
        max_image_seq_len=256,
    )


class Prompts:
    """Embeddings of prompts, computed once each."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
        self._clip = CLIPTextModel.from_pretrained(directory / "text_encoder").eval()
        self._t5 = T5EncoderModel.from_pretrained(directory / "text_encoder_2").eval()
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the pooled [B, W] and the token embeddings [B, L, W]."""
        if unknown := sorted({prompt for prompt in prompts if prompt not in self._known}):
            with torch.no_grad():
                pooled, tokens = text.encode(self._clip, self._t5, text.tokenize(self._tokenizer, unknown))
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

    def batch(self) -> tuple[torch.Tensor, list[str]]:
        """Draw a batch of clean latents [B, N, 64] and prompts."""
        chosen = self._random.integers(0, self._filled, self.size.batch)
        return self._latents[torch.from_numpy(chosen)], [self._prompts[index] for index in chosen]


def image_ids(side: int) -> torch.Tensor:
    """Give the pipeline's position ids of a square image, [side * side, 3]."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


def forward(
    model: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    guidance: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor],
    side: int,
) -> torch.Tensor:
    """Predict the velocity as the pipeline would have it predicted."""
    # At these lengths plain matrix products are several times faster than the fused kernel's backward on a CPU.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity: torch.Tensor = model(
            hidden_states=latents,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=prompt[0],
            encoder_hidden_states=prompt[1],
            txt_ids=torch.zeros(text.LENGTH, 3),
            img_ids=image_ids(side),
            return_dict=False,
        )[0]
    return velocity.float()


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    """Muon for the blocks' matrices, AdamW for everything else."""
    hidden = {
        name
        for name, parameter in model.named_parameters()
        if "transformer_blocks" in name and parameter.ndim == 2 and "norm" not in name
    }
    return MuonWithAdamW(model, hidden, lr=_RATE)


def train(directory: Path, minutes: float, *, go_on: bool = False) -> None:
    """Train for some minutes and save the averaged weights, now and then and at the end.

    `go_on` starts from the saved weights, at the late mixture of sizes and guided throughout.
    """
    seed = 3 if go_on else 2
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    vae = AutoencoderTiny.from_pretrained(directory / "vae").eval().to(memory_format=torch.channels_last)
    prompts = Prompts(directory)
    stores = [Store(size, vae, 10 * seed + which) for which, size in enumerate(SIZES)]
    for store in stores:
        for _ in range(store.size.stored // 4 // 64):
            store.add(64)
    build_scheduler().save_pretrained(directory / "scheduler")
    model = build()
    if go_on:
        model.load_state_dict(FluxTransformer2DModel.from_pretrained(directory / "transformer").state_dict())
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = optimizer_of(model)
    stage = Stage("transformer", directory, minutes)
    seen, losses = [0] * len(SIZES), [0.0] * len(SIZES)
    while stage.progress < 1.0:
        share = SIZES[0].shares[go_on or stage.progress > _LATE]
        which = 0 if (stage.step * share) % 1.0 < share else 1
        store, size = stores[which], SIZES[which]
        store.add(size.fresh)
        loss = _loss(model, average, store, prompts, random, guided=go_on or stage.progress > _GUIDANCE_START)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(stage.lr_factor(warmup_steps=150, decay_share=0.35))
        decay = min(_AVERAGING, (stage.step + 1) / (stage.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        seen[which] += size.batch
        losses[which] += (1.0 if losses[which] == 0.0 else 0.02) * (loss.item() - losses[which])
        if stage.step % 50 == 0:
            counts = {f"samples_{size.pixels}": count for size, count in zip(SIZES, seen, strict=True)}
            stage.log(**counts, **{f"loss_{s.pixels}": value for s, value in zip(SIZES, losses, strict=True)})
        if stage.step % _CHECKPOINT_STEPS == _CHECKPOINT_STEPS - 1:
            save(average, directory)
        stage.step += 1
    save(average, directory)


def save(model: FluxTransformer2DModel, directory: Path) -> None:
    """Save a denoiser in bfloat16."""
    plain = build()
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(directory / "transformer")


def _loss(
    model: nn.Module,
    average: nn.Module,
    store: Store,
    prompts: Prompts,
    random: np.random.Generator,
    *,
    guided: bool,
) -> torch.Tensor:
    clean, words = store.batch()
    size, count = store.size, store.size.batch
    words = ["" if random.random() < _EMPTY_SHARE else word for word in words]
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    sigma = size.shift * uniform / (1.0 + (size.shift - 1.0) * uniform)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    target = noise - clean
    guidance = torch.ones(count)
    prompt = prompts.embed(words)
    if guided:
        share = int(count * _GUIDED_SHARE)
        guidance[:share] = torch.empty(share).uniform_(*_GUIDANCE_RANGE)
        one = torch.ones(share)
        with torch.no_grad():
            empty = prompts.embed([""] * share)
            conditional = (prompt[0][:share], prompt[1][:share])
            given = forward(average, noisy[:share], sigma[:share], one, conditional, size.side)
            without = forward(average, noisy[:share], sigma[:share], one, empty, size.side)
        target[:share] += (guidance[:share, None, None] - 1.0) * (given - without)
    predicted = forward(model, noisy, sigma, guidance, prompt, size.side)
    return (predicted - target).square().mean()
