"""The judge: a small network that says whether a picture shows what its prompt asked for.

It was trained on the renderer that made the model's training pictures, never on the model's own. Its score is soft:
the geometric mean of the probabilities of everything the prompt names (objects, their order, background, size,
place), times the probability that the picture is intact. Its features serve for a Frechet distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fastdit.mini.prompts import BACKGROUNDS, OBJECTS, PLACES, SIZES, Scene, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    Images = torch.Tensor | Sequence[Image]

INPUT = 128
_WIDTHS = (48, 96, 128)
_FILE = Path(__file__).parent / "weights" / "judge.safetensors"

#: The parts that a picture is read for. `second` has one entry more than there are objects: nothing.
PARTS: dict[str, int] = {
    "first": len(OBJECTS),
    "second": len(OBJECTS) + 1,
    "axis": 2,
    "background": len(BACKGROUNDS),
    "size": len(SIZES) + 1,
    "place": len(PLACES),
    "intact": 1,
}
NOTHING = len(OBJECTS)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.second(functional.gelu(self.first(functional.gelu(self.norm(hidden_states)))))
        return hidden_states + change


class Judge(nn.Module):
    """Reads pictures of any size; they are resized to 128 pixels first."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 6, stride=4, padding=1), _Residual(_WIDTHS[0])]
        for narrow, wide in pairwise(_WIDTHS):
            layers += [nn.Conv2d(narrow, wide, 2, stride=2), _Residual(wide), _Residual(wide)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, _WIDTHS[-1]), nn.GELU())
        self.heads = nn.Linear(_WIDTHS[-1] * 5, sum(PARTS.values()))

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Give the logits of every part and the features [B, 128] of pictures [B, 3, H, W] in [0, 1]."""
        hidden_states = self.body(as_input(pixels) * 2.0 - 1.0)
        features = hidden_states.mean(dim=(2, 3))
        quarters = functional.adaptive_avg_pool2d(hidden_states, 2).flatten(1)
        logits = self.heads(torch.cat([features, quarters], dim=1)).split_with_sizes(list(PARTS.values()), dim=1)
        return dict(zip(PARTS, logits, strict=True)), features

    @torch.no_grad()
    def features(self, images: Images) -> torch.Tensor:
        """Give features for a Frechet distance, float32 [B, 128]."""
        return torch.cat([self(batch)[1] for batch in as_pixels(images).split(64)])

    @torch.no_grad()
    def parts(self, images: Images, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Give, for each part that some prompt asks for, its probability [B] (NaN where a prompt does not ask).

        `objects`, `background`, `size`, `place` and `intact` are probabilities; `objects_right`, `background_right`,
        `size_right` and `place_right` say whether the likeliest reading is what was asked.
        """
        pixels = as_pixels(images)
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} pictures and {len(prompts)} prompts: give one prompt a picture")
        read = [self(batch)[0] for batch in pixels.split(64)]
        logits = {name: torch.cat([batch[name] for batch in read]) for name in PARTS}
        rows = [_judge_one({name: value[i] for name, value in logits.items()}, parse(p)) for i, p in enumerate(prompts)]
        names = sorted({name for row in rows for name in row})
        return {name: torch.tensor([row.get(name, float("nan")) for row in rows]) for name in names}

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Give each picture's soft score in [0, 1], float32 [B]."""
        parts = self.parts(images, prompts)
        asked = torch.stack([parts[name] for name in ("objects", "background", "size", "place") if name in parts])
        mean = asked.clamp_min(1e-6).log().nanmean(dim=0).exp()
        return mean * parts["intact"]


def wanted(scene: Scene) -> dict[str, int]:
    """Give the classes that a picture of a scene must show, by part; parts that the scene leaves open are left out."""
    asked: dict[str, int] = {}
    if scene.kind == "single":
        asked |= {"first": OBJECTS.index(scene.objects[0]), "second": NOTHING}
        if scene.size is not None:
            asked["size"] = 1 + SIZES.index(scene.size)
        if scene.place is not None:
            asked["place"] = PLACES.index(scene.place)
    else:
        # The first object of a pair is the one that lies left or on top.
        ordered = scene.objects if scene.relation in ("left of", "above") else scene.objects[::-1]
        asked |= {"first": OBJECTS.index(ordered[0]), "second": OBJECTS.index(ordered[1])}
        asked["axis"] = 0 if scene.relation in ("left of", "right of") else 1
    if scene.background is not None:
        asked["background"] = BACKGROUNDS.index(scene.background)
    return asked


def _judge_one(logits: dict[str, torch.Tensor], scene: Scene) -> dict[str, float]:
    asked = wanted(scene)
    objects = [name for name in ("first", "second", "axis") if name in asked]
    chances = {name: float(logits[name].softmax(dim=0)[index]) for name, index in asked.items()}
    right = {name: int(logits[name].argmax()) == index for name, index in asked.items()}
    row = {
        "intact": float(logits["intact"].sigmoid()),
        "objects": float(np.prod([chances[name] for name in objects]) ** (1.0 / len(objects))),
        "objects_right": float(all(right[name] for name in objects)),
    }
    for name in ("background", "size", "place"):
        if name in asked:
            row[name], row[f"{name}_right"] = chances[name], float(right[name])
    return row


def as_pixels(images: Images) -> torch.Tensor:
    """Turn a tensor [B, 3, H, W] in [0, 1], or a list of PIL pictures, into a float32 tensor."""
    if isinstance(images, torch.Tensor):
        return images.float()
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """Resize pictures [B, 3, H, W] to what the judge sees, [B, 3, 128, 128]."""
    if pixels.shape[-2:] == (INPUT, INPUT):
        return pixels
    return functional.interpolate(pixels, size=(INPUT, INPUT), mode="bilinear", antialias=True)


def load_judge() -> Judge:
    """Load the judge that comes with the package."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(_FILE).items()})
    return judge.eval().requires_grad_(False)
