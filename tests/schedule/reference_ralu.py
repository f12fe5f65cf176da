"""RALU written out in a straight line: plain loops, plain tensors, the plain FLUX transformer, one image at a time.

It follows the paper (arXiv 2507.08422) and shares nothing with the package. What is random is drawn in this order:

1. the pipeline's own full-size noise (batch, channels, height / 8, width / 8) from the user's generator or generators;
   the first latents are its 2 x 2 blocks added up and halved, (a + b + c + d) / 2, which is unit noise again;
2. at the switch 1 -> 2, one `randn_tensor` of (batch, tokens of stage 2, channels of a token) in float32. Its tokens
   are the kept coarse tokens in raster order, then for each selected coarse token in raster order its children
   (0,0), (0,1), (1,0), (1,1);
3. at the switch 2 -> 3, one of (batch, tokens of stage 3, channels of a token): the four children of each kept coarse
   token, in the order of the kept tokens, then the children that already were there in their order. After that the
   tokens are put into raster order.

With fidelity "paper", (batch, coarse tokens) of noise are drawn before 2: a millionth of it breaks ties between equal
edge scores. With "exact" ties go to the earlier token in raster order and nothing is drawn.

How grey values become integers is not decided here: `edge_selection` refuses a choice that depends on it, so a test
has to take a seed where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


def unshift(sigma: float, shift: float) -> float:
    return sigma / (shift - (shift - 1.0) * sigma)


def shifted(u: float, shift: float) -> float:
    return shift * u / (1.0 + (shift - 1.0) * u)


def restart_time(end: float, z: float) -> float:
    """Where the next stage begins when a stage stops at time `end` (0 noise, 1 data)."""
    return end / (z * (1.0 - end) + end)


def stage_sigmas(
    steps: tuple[int, int, int], ends: tuple[float, float], shifts: tuple[float, float, float], z: float
) -> list[list[float]]:
    """The noise levels of each stage, both borders included."""
    starts = (0.0, restart_time(ends[0], z), restart_time(ends[1], z))
    result = []
    for n, start, end, shift in zip(steps, starts, (*ends, 1.0), shifts, strict=True):
        first, last = unshift(1.0 - start, shift), unshift(1.0 - end, shift)
        result.append([shifted(first + (last - first) * i / n, shift) for i in range(n + 1)])
    return result


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, h, w) -> (batch, h/2 * w/2, channels * 4), raster order."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    b, _, d = tokens.shape
    grid = tokens.reshape(b, rows, columns, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(b, d // 4, rows * 2, columns * 2)


def ids(positions: list[tuple[float, float]]) -> Tensor:
    return torch.tensor([[0.0, row, column] for row, column in positions])


CHILDREN = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))


def correlated(white: Tensor, c: float) -> Tensor:
    """Turn four consecutive white tokens into one group with covariance I - c J, J all ones."""
    groups = white.reshape(-1, 4, white.shape[-1])
    factor = (1.0 - 4.0 * c) ** 0.5 - 1.0
    return (groups + factor * groups.mean(dim=1, keepdim=True)).reshape(white.shape)


def edge_scores(picture: Tensor, rows: int, columns: int, *, fidelity: str, rounding: str) -> list[int]:
    """The number of Canny edge pixels (times 255) in each token's 16 x 16 block of a decoded (3, h, w) picture."""
    red, green, blue = picture.double().numpy()
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    if fidelity == "exact":
        grey = (grey + 1.0) / 2.0
    grey = np.clip(grey, 0.0, 1.0) * 255.0
    edges = cv2.Canny((np.rint(grey) if rounding == "nearest" else grey).astype(np.uint8), 100, 200)
    height, width = edges.shape
    blocks = edges.astype(np.int64).reshape(rows, height // rows, columns, width // columns)
    return [int(score) for score in blocks.sum(axis=(1, 3)).reshape(-1)]


def edge_selection(
    picture: Tensor, rows: int, columns: int, k: int, *, fidelity: str, tie_breaker: Tensor | None
) -> list[int]:
    """The k tokens with the most edges, in raster order; refuses a choice that hangs on how greys are rounded."""
    choices = []
    for rounding in ("nearest", "down"):
        scores: list[float] = list(edge_scores(picture, rows, columns, fidelity=fidelity, rounding=rounding))
        if tie_breaker is not None:
            scores = [score + 1e-6 * float(noise) for score, noise in zip(scores, tie_breaker, strict=True)]
        order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
        choices.append(sorted(order[:k]))
    if choices[0] != choices[1]:
        raise ValueError("the choice depends on how grey values are rounded")
    return choices[0]


@dataclass
class Result:
    """Where the run ended, and what it went through."""

    latents: Tensor
    """(batch, tokens, channels): the packed latents at noise level zero."""
    selected: list[list[int]]
    """Per image, the coarse tokens that were refined early."""
    trajectory: list[Tensor]
    """The latents after every step, before the switch where there is one."""


def ralu(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    *,
    sigmas: list[list[float]],
    ends: tuple[float, float],
    z: float,
    ratio: float,
    fidelity: str,
    height: int,
    width: int,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    generator: Generators,
    guidance_scale: float = 3.5,
    latents: Tensor | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> Result:
    """Denoise one batch; `sigmas` are the stages' noise levels, as `stage_sigmas` makes them.

    `forward` stands in for the transformer: it gets its arguments, and the number of the image and of the step besides.
    """
    batch = prompt_embeds.shape[0]
    channels = transformer.config.in_channels // 4
    c = 1.0 / z**2
    text_ids = torch.zeros(prompt_embeds.shape[1], 3)
    guidance = torch.full([1], guidance_scale) if transformer.config.guidance_embeds else None

    def velocity(x: Tensor, image: int, positions: list[tuple[float, float]], sigma: float) -> Tensor:
        timestep = torch.tensor([sigma], dtype=torch.float32) * 1000.0
        arguments = {
            "hidden_states": x[None],
            "timestep": timestep / 1000,
            "guidance": guidance,
            "pooled_projections": pooled_prompt_embeds[image : image + 1],
            "encoder_hidden_states": prompt_embeds[image : image + 1],
            "txt_ids": text_ids,
            "img_ids": ids(positions),
        }
        if forward is not None:
            return forward(image=image, step=len(trajectory), **arguments)[0]
        return transformer(**arguments, return_dict=False)[0][0]

    # The user's noise at full size, halved.
    rows, columns = height // 16, width // 16
    if latents is None:
        full = randn_tensor((batch, channels, rows * 2, columns * 2), generator=generator, dtype=prompt_embeds.dtype)
    else:
        full = unpack(latents, rows, columns)
    a, b = full[:, :, 0::2, 0::2], full[:, :, 0::2, 1::2]
    d, e = full[:, :, 1::2, 0::2], full[:, :, 1::2, 1::2]
    x = list(pack((a + b + d + e) / 2.0))
    rows, columns = rows // 2, columns // 2
    coarse = [(float(r), float(q)) for r in range(rows) for q in range(columns)]
    trajectory: list[Tensor] = []

    # Stage 1: the coarse grid.
    clean = list(x)
    for sigma, after in zip(sigmas[0][:-1], sigmas[0][1:], strict=True):
        for image in range(batch):
            v = velocity(x[image], image, coarse, sigma)
            clean[image] = x[image] - sigma * v
            x[image] = x[image] + (after - sigma) * v
        trajectory.append(torch.stack(x))

    # 1 -> 2: the tokens with the most edges become four.
    k = int(ratio * len(coarse))
    selected, kept = [], []
    ties = None
    if fidelity == "paper":
        ties = randn_tensor((batch, len(coarse)), generator=generator, dtype=torch.float32)
    for image in range(batch):
        picture_latents = unpack(clean[image][None], rows, columns)
        picture_latents = picture_latents / vae.config.scaling_factor + vae.config.shift_factor
        picture = vae.decode(picture_latents, return_dict=False)[0][0]
        tie_breaker = None if ties is None else ties[image]
        selected.append(edge_selection(picture, rows, columns, k, fidelity=fidelity, tie_breaker=tie_breaker))
        kept.append([token for token in range(len(coarse)) if token not in selected[image]])
    mixed_count = len(coarse) - k + 4 * k
    white = randn_tensor((batch, mixed_count, channels * 4), generator=generator, dtype=torch.float32)
    scale = 1.0 / (z * (1.0 - ends[0]) + ends[0])
    spread = z * (1.0 - ends[0]) * scale
    alone = (1.0 - c) ** 0.5 if fidelity == "exact" else 1.0
    mixed: list[list[tuple[float, float]]] = []
    for image in range(batch):
        coarse_part = x[image][kept[image]]
        fine_part = x[image][selected[image]].repeat_interleave(4, dim=0)
        n = len(kept[image])
        noise = torch.cat([alone * white[image, :n], correlated(white[image, n:], c)])
        x[image] = scale * torch.cat([coarse_part, fine_part]) + spread * noise
        children = [(coarse[t][0] + r, coarse[t][1] + q) for t in selected[image] for r, q in CHILDREN]
        mixed.append([coarse[t] for t in kept[image]] + children)

    # Stage 2: coarse and fine tokens together, positions in the coarse frame.
    for sigma, after in zip(sigmas[1][:-1], sigmas[1][1:], strict=True):
        for image in range(batch):
            v = velocity(x[image], image, mixed[image], sigma)
            x[image] = x[image] + (after - sigma) * v
        trajectory.append(torch.stack(x))

    # 2 -> 3: the rest becomes four, too.
    white = randn_tensor((batch, 4 * len(coarse), channels * 4), generator=generator, dtype=torch.float32)
    scale = 1.0 / (z * (1.0 - ends[1]) + ends[1])
    spread = z * (1.0 - ends[1]) * scale
    fine = [(float(r), float(q)) for r in range(rows * 2) for q in range(columns * 2)]
    for image in range(batch):
        n = len(kept[image])
        children_of_kept = x[image][:n].repeat_interleave(4, dim=0)
        noise = torch.cat([correlated(white[image, : 4 * n], c), alone * white[image, 4 * n :]])
        tokens = scale * torch.cat([children_of_kept, x[image][n:]]) + spread * noise
        places = [(p[0] + r, p[1] + q) for p in mixed[image][:n] for r, q in CHILDREN] + mixed[image][n:]
        where = {(2.0 * r, 2.0 * q): i for i, (r, q) in enumerate(places)}
        x[image] = torch.stack([tokens[where[place]] for place in fine])

    # Stage 3: the whole grid at full size.
    for sigma, after in zip(sigmas[2][:-1], sigmas[2][1:], strict=True):
        for image in range(batch):
            v = velocity(x[image], image, fine, sigma)
            x[image] = x[image] + (after - sigma) * v
        trajectory.append(torch.stack(x))

    return Result(torch.stack(x), selected, trajectory)


def flux_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The part of a FLUX pipeline call that `ralu` understands."""
    return {name: call[name] for name in ("height", "width", "prompt_embeds", "pooled_prompt_embeds")}
