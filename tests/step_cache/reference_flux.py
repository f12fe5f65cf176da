"""FLUX taken apart: the transformer's forward in three pieces and the pipeline's loop, both straight-line.

The references of the step caches put their own decision where the block stack is. Text encoders, pictures and progress
bars are left out: the loop returns packed latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor


@dataclass
class Embedded:
    """What the blocks of one forward start from."""

    image: Tensor
    text: Tensor
    temb: Tensor
    rotary: Any


def embed(
    model: FluxTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    pooled: Tensor,
    prompt: Tensor,
    text_ids: Tensor,
    image_ids: Tensor,
) -> Embedded:
    image = model.x_embedder(latents)
    timestep = timestep.to(image.dtype) * 1000
    if guidance is None:
        temb = model.time_text_embed(timestep, pooled)
    else:
        temb = model.time_text_embed(timestep, guidance.to(image.dtype) * 1000, pooled)
    text = model.context_embedder(prompt)
    return Embedded(image, text, temb, model.pos_embed(torch.cat((text_ids, image_ids), dim=0)))


def first_signal(model: FluxTransformer2DModel, at: Embedded) -> Tensor:
    """TeaCache's signal: the modulated input of the first block."""
    return model.transformer_blocks[0].norm1(at.image, emb=at.temb)[0]


def run_blocks(model: FluxTransformer2DModel, at: Embedded, image: Tensor, text: Tensor, start: int) -> list[Tensor]:
    """Run the blocks from number `start` (double and single counted through); the image stream after each of them."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    states = []
    for block in blocks[start:]:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            temb=at.temb,
            image_rotary_emb=at.rotary,
            joint_attention_kwargs={},
        )
        states.append(image)
    return states


def first_block(model: FluxTransformer2DModel, at: Embedded) -> tuple[Tensor, Tensor]:
    """(text, image) after the first block."""
    return model.transformer_blocks[0](
        hidden_states=at.image,
        encoder_hidden_states=at.text,
        temb=at.temb,
        image_rotary_emb=at.rotary,
        joint_attention_kwargs={},
    )


def head(model: FluxTransformer2DModel, at: Embedded, image: Tensor) -> Tensor:
    return model.proj_out(model.norm_out(image, at.temb))


@dataclass
class Trace:
    """The final packed latents and, per branch, what was decided at each step and why."""

    latents: Tensor
    computed: dict[str, list[bool]] = field(default_factory=dict)
    signals: dict[str, list[float]] = field(default_factory=dict)


Stack = Callable[[FluxTransformer2DModel, Embedded, int], tuple[Tensor, bool, float]]
"""(model, embedded, step) -> (image stream after all blocks, computed?, the number decided on)."""


def denoise(
    pipe: FluxPipeline, call: dict[str, Any], generator: Any, stacks: Sequence[Stack], guidance_scale: float = 3.5
) -> Trace:
    """The plain FLUX loop; `stacks` has one entry a branch: conditional, then unconditional if there is one."""
    steps, height, width = call["num_inference_steps"], call["height"], call["width"]
    model, scheduler = pipe.transformer, type(pipe.scheduler).from_config(pipe.scheduler.config)
    batch = call["prompt_embeds"].shape[0]
    branches = [("cond", call["prompt_embeds"], call["pooled_prompt_embeds"])]
    if "negative_prompt_embeds" in call:
        branches.append(("uncond", call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]))
    latents, image_ids = pipe.prepare_latents(
        batch, model.config.in_channels // 4, height, width, torch.float32, torch.device("cpu"), generator
    )
    tokens = latents.shape[1]
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)
    guidance = torch.full([1], guidance_scale).expand(batch) if model.config.guidance_embeds else None
    trace = Trace(latents, {name: [] for name, *_ in branches}, {name: [] for name, *_ in branches})
    for step, t in enumerate(scheduler.timesteps):
        predictions = []
        for (name, prompt, pooled), stack in zip(branches, stacks, strict=True):
            timestep = t.expand(batch).to(latents.dtype) / 1000
            text_ids = torch.zeros(prompt.shape[1], 3)
            at = embed(model, latents, timestep, guidance, pooled, prompt, text_ids, image_ids)
            image, computed, signal = stack(model, at, step)
            predictions.append(head(model, at, image))
            trace.computed[name].append(computed)
            trace.signals[name].append(signal)
        prediction = predictions[0]
        if len(predictions) == 2:
            prediction = predictions[1] + call["true_cfg_scale"] * (predictions[0] - predictions[1])
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    trace.latents = latents
    return trace
