"""Likeness by what networks see: LPIPS and DINOv2, with weights that are here already. Nothing is downloaded.

LPIPS (Zhang et al., arXiv 1801.03924) is a distance, 0 for equal pictures: the squared difference of AlexNet's
features, normalised at each place, weighed by channel, averaged over places, summed over five layers. DINOv2's
(arXiv 2304.07193) is the cosine between the class tokens of two pictures, 1 for equal ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL.Image import Image, Resampling
from torch import nn

from fastdit.errors import FastditError, InvalidConfig

#: What is known here, and what its weights are called where no place is said.
NAMES = {"lpips": "alexnet-owt-7be5be79.pth", "dinov2": "facebook/dinov2-base"}

#: Sides of the pictures that DINOv2 is shown, and the means and deviations of the colours it was trained on.
_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: The layers of AlexNet whose outputs LPIPS compares, and what it shifts and scales colours in -1 to 1 by.
_LAYERS = (1, 4, 7, 9, 11)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class MissingWeights(FastditError):
    """A network's weights, or what reads them, are not on this machine."""


@dataclass(frozen=True)
class Wanted:
    """A likeness by name, and where its weights are: a file of AlexNet's, a folder of a DINOv2, None for the usual."""

    name: str
    weights: str | None

    @classmethod
    def parsed(cls, text: str) -> Wanted:
        """Read `lpips`, `dinov2`, `dinov2=FOLDER`. Raises `InvalidConfig` for others.

        >>> Wanted.parsed("dinov2=./dino").weights
        './dino'
        """
        name, _, weights = text.partition("=")
        if name not in NAMES:
            raise InvalidConfig(f"fidelity is {' or '.join(NAMES)}, or either=WHERE its weights are, got {text!r}")
        return cls(name, weights or None)


@dataclass(frozen=True)
class Likeness:
    """A network that compares pictures; `said` names it, its weights and what runs them."""

    said: str
    network: nn.Module

    def __call__(self, images: Sequence[Image], references: Sequence[Image]) -> list[float]:
        """Compare each image with its reference."""
        with torch.inference_mode():
            return [float(self.network(*pair)) for pair in zip(images, references, strict=True)]


@functools.cache
def opened(text: str) -> Likeness:
    """Open a likeness by what `Wanted.parsed` reads. Raises `MissingWeights` with what is to be provided."""
    wanted = Wanted.parsed(text)
    return _lpips(wanted.weights) if wanted.name == "lpips" else _dinov2(wanted.weights)


class _Lpips(nn.Module):
    """AlexNet's features up to its last rectifier, and a weight for each channel of five of them."""

    def __init__(self) -> None:
        super().__init__()
        channels = (
            (3, 64, 11, 4, 2),
            (64, 192, 5, 1, 2),
            (192, 384, 3, 1, 1),
            (384, 256, 3, 1, 1),
            (256, 256, 3, 1, 1),
        )
        first, second, *others = (nn.Sequential(nn.Conv2d(*sizes), nn.ReLU()) for sizes in channels)
        pooled = [*first, nn.MaxPool2d(3, 2), *second, nn.MaxPool2d(3, 2)]
        self.features = nn.Sequential(*pooled, *(layer for pair in others for layer in pair))
        self.lins = nn.ModuleList(nn.Conv2d(sizes[1], 1, 1, bias=False) for sizes in channels)

    def forward(self, image: Image, reference: Image) -> torch.Tensor:
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        sides = [((2.0 * _pixels(one) - 1.0) - shift) / scale for one in (image, reference)]
        total = torch.zeros(())
        for weigh, ours, theirs in zip(self.lins, *map(self._seen, sides), strict=True):
            total = total + weigh((ours - theirs) ** 2).mean()
        return total

    def _seen(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        for number, layer in enumerate(self.features):
            pixels = layer(pixels)
            if number in _LAYERS:
                yield pixels / (pixels.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def _lpips(weights: str | None) -> Likeness:
    file = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / NAMES["lpips"]
    own = files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth"
    if not file.is_file() or not own.is_file():
        missing = file if not file.is_file() else "the linear weights of LPIPS that torchmetrics has"
        raise MissingWeights(
            f"LPIPS can't be had here: there is no {missing}. It needs torchmetrics (pip install 'fastdit[demo]') and "
            f"AlexNet's weights as torchvision publishes them, {NAMES['lpips']}: put the file there, or name it by "
            "lpips=FILE. Nothing is downloaded"
        )
    network = _Lpips()
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        linear = torch.load(str(own), map_location="cpu", weights_only=True)
        kept = {name: value for name, value in loaded.items() if name.startswith("features.")}
        lins = {f"lins.{number}.weight": linear[f"lin{number}.model.1.weight"] for number in range(len(_LAYERS))}
        network.load_state_dict({**kept, **lins})
    except Exception as error:  # a file of anything else fails in as many ways as there are files
        raise MissingWeights(f"{file} holds no weights of AlexNet that can be read: {error}") from error
    said = f"LPIPS of AlexNet {_digest(file)} ({file.name}), linear weights of torchmetrics {version('torchmetrics')}"
    return Likeness(said, network.eval())


class _Dino(nn.Module):
    """The cosine between the class tokens that a DINOv2 gives to two pictures, each resized to a square."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Image, reference: Image) -> torch.Tensor:
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
        side = _SIDE // self.model.config.patch_size * self.model.config.patch_size
        shown = [one.convert("RGB").resize((side, side), Resampling.BICUBIC) for one in (image, reference)]
        pixels = torch.cat([(_pixels(one) - mean) / deviation for one in shown])
        ours, theirs = self.model(pixels).last_hidden_state[:, 0]
        return nn.functional.cosine_similarity(ours, theirs, dim=0)


def _dinov2(weights: str | None) -> Likeness:
    name = weights or NAMES["dinov2"]
    try:
        # transformers asks the hub for adapters of a name whatever it is told, and nothing for those of a folder.
        folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
        model: Any = import_module("transformers").AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"DINOv2 can't be had here: {name} is no folder of its weights, and not in the hub's local cache. It needs "
            "transformers and a folder with config.json and model.safetensors, such as `hf download "
            f"{NAMES['dinov2']} --local-dir dino` makes: name it by dinov2=dino. Nothing is downloaded"
        ) from error
    if model.config.model_type != "dinov2":
        raise MissingWeights(f"{name} holds a model of the type {model.config.model_type}, and no DINOv2")
    kept = hashlib.sha256()
    for parameter in model.parameters():
        kept.update(parameter.detach().float().numpy().tobytes())
    said = f"class tokens of DINOv2 {kept.hexdigest()[:8]} ({Path(name).name}), transformers {version('transformers')}"
    return Likeness(said, _Dino(model.float().eval()))


def _pixels(image: Image) -> torch.Tensor:
    """Give a picture as [1, 3, H, W] in 0 to 1."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]
