"""What is published of a training: the parts that there are, the transformer's by its averaged weights, in float16.

Optimisers and the weights that they step stay behind: their memory is some tens of steps long, the learning rate warms
up again without it, and training goes on from the average.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdit.mini.large.pipeline import WEIGHTS

FOLDER = Path(__file__).parent / "checkpoint"
_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
_TRANSFORMER = "transformer.safetensors"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Weights:
    """The averaged weights, and how far training is."""

    average: dict[str, Tensor]
    numbers: dict[str, float]


def publish(directory: Path, folder: Path | None = None) -> None:
    """Write the checkpoint in `folder` from a working directory, over the one before."""
    folder = folder or FOLDER
    folder.mkdir(exist_ok=True)
    for part in _PARTS:
        if (directory / part).exists():
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(directory / part, folder / part)
            for path in (folder / part).glob("*.safetensors"):
                _halve(load_file(path), path)
    shutil.copy(directory / "log.jsonl", folder / "log.jsonl")
    progress = json.loads((folder / _PROGRESS).read_text()) if (folder / _PROGRESS).exists() else {}
    for path in sorted(directory.glob("*.pt")):
        state = torch.load(path, weights_only=True, map_location="cpu")
        progress[path.stem] = {name: value for name, value in state.items() if isinstance(value, (int, float))}
        if path.stem == "transformer":
            _halve(state["average"], folder / _TRANSFORMER)
    (folder / _PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")


def deliver(directory: Path, package: Path = WEIGHTS) -> None:
    """Write the package's weights, all in float16, from a working directory; judges where they are trained."""
    from training.large.transformer import build

    package.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        shutil.rmtree(package / part, ignore_errors=True)
        shutil.copytree(directory / part, package / part)
        for path in (package / part).glob("*.safetensors"):
            _halve(load_file(path), path)
    state = torch.load(directory / "transformer.pt", weights_only=True, map_location="cpu")
    transformer = build()
    transformer.load_state_dict(state["average"])
    transformer.half().save_pretrained(package / "transformer")
    for path in directory.glob("judge-*.safetensors"):
        shutil.copy(path, package / path.name)


def numbers_of(stage: str, folder: Path | None = None) -> dict[str, float] | None:
    """Give how far a published stage is, if it is published."""
    path = (folder or FOLDER) / _PROGRESS
    found: dict[str, float] | None = json.loads(path.read_text()).get(stage) if path.exists() else None
    return found


def minutes_of(stage: str, directory: Path) -> float:
    """Give how long a stage was trained so far, by the working directory or else as published."""
    path = directory / f"{stage}.pt"
    if path.exists():
        return float(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["seconds"]) / 60
    return (numbers_of(stage) or {"seconds": 0.0})["seconds"] / 60


def unpack(directory: Path, folder: Path | None = None) -> None:
    """Copy the published parts and the log to a working directory, where they are not there yet."""
    folder = folder or FOLDER
    if not folder.exists():
        return
    for part in _PARTS:
        if (folder / part).exists() and not (directory / part).exists():
            shutil.copytree(folder / part, directory / part)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "log.jsonl").exists():
        shutil.copy(folder / "log.jsonl", directory / "log.jsonl")


def transformer(folder: Path | None = None) -> Weights | None:
    """Give the published transformer, if there is one."""
    path = (folder or FOLDER) / _TRANSFORMER
    if not path.exists():
        return None
    numbers = numbers_of("transformer", folder)
    assert numbers is not None
    return Weights({name: tensor.float() for name, tensor in load_file(path).items()}, numbers)


def _halve(weights: dict[str, Tensor], path: Path) -> None:
    """Save weights in float16."""
    half = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(half, path, metadata={"format": "pt"})
