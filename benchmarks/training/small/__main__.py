"""The recipe in one command, `python -m training.small all --directory DIR` in benchmarks/, or one stage of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from fastdit.mini import Architecture
from training.small.stage import MINI

app = typer.Typer(help="Train the embedded pipelines and their judge, stage by stage.", add_completion=False)

Directory = Annotated[Path, typer.Option(help="Where the parts are written and read.")]
Minutes = Annotated[float, typer.Option(help="Time to train this stage.")]


@app.command()
def autoencoder(directory: Directory = Path("fastdit-mini"), minutes: Minutes = 8.0) -> None:
    """Train the autoencoder."""
    from training.small.autoencoder import train_autoencoder

    train_autoencoder(directory, minutes)


@app.command()
def text(directory: Directory = Path("fastdit-mini"), minutes: Minutes = 1.7) -> None:
    """Train the text encoders."""
    from training.small.text import train

    train(directory, minutes)


@app.command()
def transformer(
    directory: Directory = Path("fastdit-mini"),
    minutes: Minutes = 108.0,
    go_on: Annotated[bool, typer.Option(help="Start from the transformer that DIR already holds.")] = False,
) -> None:
    """Train the transformer; needs the autoencoder and the text encoders."""
    from training.small.transformer import train

    train(directory, minutes, go_on=go_on)


@app.command()
def sd3(
    directory: Directory = Path("fastdit-mini"),
    minutes: Minutes = 68.0,
    go_on: Annotated[bool, typer.Option(help="Start from the SD3 transformer that DIR already holds.")] = False,
) -> None:
    """Train the SD3 transformer on what the FLUX transformer says; needs all parts but the judge."""
    from training.small.sd3 import train

    train(directory, minutes, go_on=go_on)


@app.command()
def judge(directory: Directory = Path("fastdit-mini"), minutes: Minutes = 7.0) -> None:
    """Train the judge; needs the autoencoder."""
    from training.small.judge import train

    train(directory, minutes)


@app.command(name="all")
def everything(directory: Directory = Path("fastdit-mini"), scale: float = 1.0) -> None:
    """Train every stage; `scale` multiplies the times."""
    autoencoder(directory, 8.0 * scale)
    text(directory, 1.7 * scale)
    transformer(directory, 108.0 * scale)
    sd3(directory, 68.0 * scale)
    judge(directory, 7.0 * scale)


@app.command()
def install(directory: Directory = Path("fastdit-mini")) -> None:
    """Put trained parts into the package."""
    target = MINI / "weights"
    target.mkdir(exist_ok=True)
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "transformer", "scheduler", "sd3"):
        shutil.copytree(directory / name, target / name, dirs_exist_ok=True)
    shutil.copy(directory / "judge.safetensors", target / "judge.safetensors")


@app.command()
def evaluate(
    architecture: Annotated[Architecture, typer.Argument(help="The model to judge.")] = "flux",
    prompts: int = 200,
    pictures: int = 1000,
) -> None:
    """Judge an installed model: accuracy at its usual steps, and how quality falls with fewer."""
    from training.small.evaluation import evaluate as run

    run(architecture, prompts, pictures)


if __name__ == "__main__":
    app()
