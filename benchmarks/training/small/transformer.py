"""A FLUX transformer of nine million parameters, trained at 128 and 256 pixels with guidance built in.

Flow matching: x = (1 - sigma) x0 + sigma noise, target v = noise - x0. Guidance is learned as FLUX.1-dev has it, as an
input g. A part of every late batch draws g and moves its target by (g - 1)(v(prompt) - v("")), both from the averaged
weights at g = 1; where g = 1 the model is the plain conditional one, and one prompt in ten is empty.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.small import text
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

_GUIDED_SHARE = 0.4
_GUIDANCE_RANGE = (1.0, 6.0)
_GUIDANCE_START = 0.71
_AVERAGING = 0.999


SIZES = (Size(128, 64, (0.62, 0.30), 12288, 12, 1.6), Size(256, 24, (0.38, 0.70), 3072, 4, 2.4))
_LATE = 0.48


def build() -> FluxTransformer2DModel:
    """Make an untrained transformer whose blocks start as the identity (modulation and output at zero)."""
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
    start_as_identity(model)
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


def image_ids(side: int) -> torch.Tensor:
    """Give the pipeline's position ids of a square image, [side * side, 3]."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


def forward(
    model: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    guidance: torch.Tensor,
    prompt: Embedded,
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


def train(directory: Path, minutes: float, *, go_on: bool = False) -> None:
    """Train for some minutes and save the averaged weights, now and then and at the end.

    `go_on` starts from the saved weights, at the late mixture of sizes and guided throughout.
    """
    seed = 3 if go_on else 2
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    vae = AutoencoderTiny.from_pretrained(directory / "vae").eval().to(memory_format=torch.channels_last)
    prompts = Prompts(text.encoder(directory))
    stores = [Store(size, vae, 10 * seed + which) for which, size in enumerate(SIZES)]
    build_scheduler().save_pretrained(directory / "scheduler")
    model = build()
    if go_on:
        model.load_state_dict(FluxTransformer2DModel.from_pretrained(directory / "transformer").state_dict())
    average = copy.deepcopy(model).requires_grad_(False)
    stage = Stage("transformer", directory, minutes)

    def loss_of(which: int) -> torch.Tensor:
        store = stores[which]
        store.add(store.size.fresh)
        guided = go_on or stage.progress > _GUIDANCE_START
        return _loss(model, average, store, prompts, random, guided=guided)

    late = 0.0 if go_on else _LATE
    fit(stage, model, average, SIZES, loss_of, lambda: save(average, directory), late=late, averaging=_AVERAGING)


def save(model: FluxTransformer2DModel, directory: Path) -> None:
    """Save a transformer in bfloat16."""
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
    size, count = store.size, store.size.batch
    clean, words = store.draw(count)
    words = sometimes_empty(words, random)
    sigma = stratified_sigmas(count, size.shift)
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
