"""The recipe, stage by stage: `python -m training.large STAGE --minutes N`, in the folder `benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from training.large import autoencoder as autoencoder_stage
from training.large import sprites as sprites_stage
from training.large import text as text_stage
from training.large.run import DIRECTORY

app = typer.Typer(help=__doc__, add_completion=False)

Directory = Annotated[Path, typer.Option(help="Where checkpoints, the log and the parts are written and read.")]
Minutes = Annotated[float, typer.Option(help="How long to train now; what was trained before is kept.")]
Cooldown = Annotated[float, typer.Option(help="Minutes at the end in which the learning rate falls: the last call.")]
Device = Annotated[str, typer.Option(help="Where to train; cuda if there is one.")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def sprites(package: Annotated[Path, typer.Argument(help="The unpacked package @lobehub/fluent-emoji-3d.")]) -> None:
    """Copy the objects' pictures out of the package that publishes them."""
    sprites_stage.collect(package)


@app.command()
def autoencoder(
    minutes: Minutes, directory: Directory = DIRECTORY, cooldown: Cooldown = 0.0, device: Device = DEVICE
) -> None:
    """Train the autoencoder."""
    autoencoder_stage.train(directory, torch.device(device), minutes, cooldown=cooldown)


@app.command()
def text(minutes: Minutes, directory: Directory = DIRECTORY, cooldown: Cooldown = 0.0, device: Device = DEVICE) -> None:
    """Train the text encoders."""
    text_stage.train(directory, torch.device(device), minutes, cooldown=cooldown)


@app.command()
def status(directory: Directory = DIRECTORY, lines: int = 12) -> None:
    """Print the end of the log."""
    print("\n".join((directory / "log.jsonl").read_text().splitlines()[-lines:]))


if __name__ == "__main__":
    app()
