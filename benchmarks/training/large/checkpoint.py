"""What is published of a training: the pipeline's small parts, and the denoiser's weights and average, in float16.

Optimisers stay behind. Their memory is some tens of steps long, and the learning rate warms up again without it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "checkpoint"
_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
_DENOISER = "denoiser.safetensors"


@dataclass(frozen=True)
class Denoiser:
    """The weights, their average, and how far training is."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    numbers: dict[str, float]


def publish(directory: Path, folder: Path = FOLDER) -> None:
    """Write the checkpoint in `folder` from a working directory, over the one before."""
    for part in _PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(directory / part, folder / part)
        for path in (folder / part).glob("*.safetensors"):
            weights = {name: tensor.half() for name, tensor in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
    shutil.copy(directory / "log.jsonl", folder / "log.jsonl")
    state = torch.load(directory / "transformer.pt", weights_only=True, map_location="cpu")
    tensors = {
        f"{kind}.{name}": tensor.half().contiguous()
        for kind in ("model", "average")
        for name, tensor in state[kind].items()
    }
    numbers = {name: value for name, value in state.items() if isinstance(value, (int, float))}
    save_file(tensors, folder / _DENOISER, metadata={"numbers": json.dumps(numbers)})


def unpack(directory: Path, folder: Path = FOLDER) -> None:
    """Copy the published parts and the log to a working directory, where they are not there yet."""
    if not folder.exists():
        return
    for part in _PARTS:
        if not (directory / part).exists():
            shutil.copytree(folder / part, directory / part)
    if not (directory / "log.jsonl").exists():
        shutil.copy(folder / "log.jsonl", directory / "log.jsonl")


def denoiser(folder: Path = FOLDER) -> Denoiser | None:
    """Give the published denoiser, if there is one."""
    path = folder / _DENOISER
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            kind, name = key.split(".", 1)
            kinds[kind][name] = file.get_tensor(key).float()
    return Denoiser(kinds["model"], kinds["average"], numbers)
