"""The judge's training: pictures of the renderer, some through the autoencoder, some destroyed to a known degree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch.nn import functional

from fastdit.mini.judge import (
    INPUT,
    PARTS,
    Judge,
    as_input,
    wanted,
)
from fastdit.mini.prompts import BACKGROUNDS, PLACES, SIZES
from training.small.render import Picture, random_batch
from training.small.stage import Stage

_BATCH = 48
_RATE = 2e-3
_DESTROYED_SHARE = 0.4
_POOL = 1024

Pixels = npt.NDArray[np.float32]


def labels(picture: Picture) -> dict[str, int]:
    """Give the truth of every part of a picture, also of what its prompt left open; -1 where a part has no meaning."""
    scene = picture.scene
    truth = {"axis": -1, "size": -1, "place": -1, **wanted(scene)}
    truth["background"] = BACKGROUNDS.index(picture.background)
    if scene.kind == "single":
        truth["size"] = 0 if scene.size is None else 1 + SIZES.index(scene.size)
        truth["place"] = PLACES.index(scene.place or "center")
    return truth


def destroy(pixels: Pixels, other: Pixels, random: np.random.Generator) -> tuple[Pixels, float]:
    """Damage a picture in one of ten ways; give it with the severity in [0, 1].

    Blur and warping are graded by their logarithm: a softness of half a pixel, or an outline bent by one, is what few
    steps leave behind, and a linear scale would call it nothing.
    """
    size = pixels.shape[0]
    severity = float(random.uniform(0.05, 1.0))
    kind = int(random.integers(10))
    damaged: npt.NDArray[Any]
    if kind == 0:
        damaged = pixels + random.normal(0.0, 0.4 * severity, pixels.shape)
    elif kind == 1:
        damaged = cv2.GaussianBlur(pixels, (0, 0), 0.002 * size * 20.0**severity)
    elif kind == 2:
        small = max(6, int(size * (0.45 - 0.38 * severity)))
        damaged = cv2.resize(cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    elif kind == 3:
        damaged = (1.0 - 0.5 * severity) * pixels + 0.5 * severity * other
    elif kind == 4:
        damaged = _in_blocks(pixels, random, severity, lambda block, at: _elsewhere(pixels, at, random))
    elif kind == 5:
        damaged = _in_blocks(pixels, random, severity, lambda block, at: other[at])
    elif kind == 6:
        damaged = _in_blocks(pixels, random, severity, _tiled)
    elif kind in (7, 8):
        damaged = _warped(pixels, random, 0.002 * size * 20.0**severity)
    else:
        noise = cv2.resize(random.normal(0.0, 1.0, (size // 8, size // 8, 3)), (size, size)).astype(np.float32)
        damaged = pixels + 0.35 * severity * noise
    clipped: Pixels = np.clip(damaged, 0.0, 1.0).astype(np.float32)
    return clipped, severity


def _warped(pixels: Pixels, random: np.random.Generator, amplitude: float) -> Pixels:
    """Bend the picture by a smooth random field of some deviation in pixels, with bends of 1/16 to 1/5 of its side."""
    size = pixels.shape[0]
    bend = size * float(random.uniform(1 / 16, 1 / 5)) / 2.5
    field = [cv2.GaussianBlur(random.normal(0.0, 1.0, (size, size)), (0, 0), bend) for _ in range(2)]
    across, down = (amplitude * way / way.std() for way in field)
    rows, columns = np.mgrid[:size, :size]
    shifted = ((columns + across).astype(np.float32), (rows + down).astype(np.float32))
    warped: Pixels = cv2.remap(pixels, *shifted, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return warped


_Replace = Callable[[Pixels, tuple[slice, slice]], Pixels]


def _in_blocks(pixels: Pixels, random: np.random.Generator, share: float, replace: _Replace) -> Pixels:
    block = pixels.shape[0] // 8
    damaged: Pixels = pixels.copy()
    for row in range(8):
        for column in range(8):
            if random.random() < share:
                at = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
                damaged[at] = replace(pixels[at], at)
    return damaged


def _elsewhere(pixels: Pixels, at: tuple[slice, slice], random: np.random.Generator) -> Pixels:
    height, width = at[0].stop - at[0].start, at[1].stop - at[1].start
    row, column = (int(random.integers(0, pixels.shape[0] - height + 1)) for _ in range(2))
    return pixels[row : row + height, column : column + width]


def _tiled(block: Pixels, at: tuple[slice, slice]) -> Pixels:
    half = np.asarray(cv2.resize(block, (block.shape[1] // 2, block.shape[0] // 2), interpolation=cv2.INTER_AREA))
    return np.tile(half, (2, 2, 1))


class _Pictures:
    """Draws training batches; a pool of pictures has gone through the autoencoder, as the model's pictures have."""

    def __init__(self, vae: AutoencoderTiny, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pool: list[tuple[Picture, Pixels]] = []
        for index in range(_POOL // 32):
            drawn, pixels = random_batch(32, INPUT * (1 + index % 2), self._random)
            target = torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2.0 - 1.0
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                decoded = vae.decode(vae.encode(target.contiguous()).latents).sample.float()
            self._pool.extend(zip(drawn, _seen((decoded.clamp(-1.0, 1.0) + 1.0) / 2.0), strict=True))

    def batch(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Give pixels [B, 3, 128, 128], the labels of every part, and the severity of the damage [B]."""
        half = _BATCH // 2
        size = INPUT if self._random.random() < 0.7 else 2 * INPUT
        drawn, pixels = random_batch(half, size, self._random)
        rendered = _seen(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        chosen = [self._pool[int(i)] for i in self._random.integers(0, _POOL, _BATCH - half)]
        pictures = [*drawn, *(picture for picture, _ in chosen)]
        images = [*rendered, *(image for _, image in chosen)]
        severity = np.zeros(_BATCH, np.float32)
        for index in range(_BATCH):
            if self._random.random() < _DESTROYED_SHARE:
                other = images[int(self._random.integers(_BATCH))]
                images[index], severity[index] = destroy(images[index], other, self._random)
        truth = [labels(picture) for picture in pictures]
        parts = {name: torch.tensor([row[name] for row in truth]) for name in PARTS if name != "intact"}
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), parts, torch.from_numpy(severity)


def _seen(pixels: torch.Tensor) -> Pixels:
    """Give pictures [B, 3, H, W] as the judge sees them, [B, 128, 128, 3]."""
    seen: Pixels = as_input(pixels).permute(0, 2, 3, 1).numpy()
    return seen


def train(directory: Path, minutes: float) -> None:
    """Train for some minutes and save the weights in float16."""
    torch.manual_seed(3)
    vae = AutoencoderTiny.from_pretrained(directory / "vae").eval()
    source = _Pictures(vae, seed=3)
    judge = Judge()
    stage = Stage("judge", directory, minutes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_RATE, weight_decay=0.02)
    while stage.progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * stage.lr_factor(warmup_steps=100, decay_share=1.0)
        pixels, parts, severity = source.batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, _ = judge(pixels)
        intact = functional.binary_cross_entropy_with_logits(logits["intact"].float()[:, 0], 1.0 - severity)
        readable = severity < 0.5
        losses = [_part_loss(logits[name].float(), target, readable) for name, target in parts.items()]
        loss = intact + torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        stage.step += 1
        if stage.step % 100 == 0:
            stage.log(loss=loss.item(), intact=intact.item())
    save_file({n: t.half().contiguous() for n, t in judge.state_dict().items()}, directory / "judge.safetensors")


def _part_loss(logits: torch.Tensor, target: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    counted = readable & (target >= 0)
    if not counted.any():
        return logits.sum() * 0.0
    return functional.cross_entropy(logits[counted], target[counted])
