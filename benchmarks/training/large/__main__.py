"""The recipe, stage by stage: `python -m training.large STAGE --minutes N`, in the folder `benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdit.mini.language import Purpose
from training.large import autoencoder as autoencoder_stage
from training.large import checkpoint as checkpoint_stage
from training.large import judging as judging_stage
from training.large import sample as sample_stage
from training.large import sprites as sprites_stage
from training.large import text as text_stage
from training.large import transformer as transformer_stage
from training.large.run import DIRECTORY, asked_to_stop, stop_when_asked

app = typer.Typer(help=__doc__, add_completion=False)

Directory = Annotated[Path, typer.Option(help="Where checkpoints, the log and the parts are written and read.")]
Minutes = Annotated[
    float,
    typer.Option(
        help="How long to train now, in the processor's time on a CPU; it goes on from what was trained before."
    ),
]
Cooldown = Annotated[float, typer.Option(help="Minutes at the end in which the learning rate falls: the last call.")]
Device = Annotated[str, typer.Option(help="Where to train; cuda if there is one.")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def sprites(package: Annotated[Path, typer.Argument(help="The unpacked package @lobehub/fluent-emoji-3d.")]) -> None:
    """Copy the objects' pictures out of the package that publishes them."""
    sprites_stage.collect(package)


@app.command()
def autoencoder(
    minutes: Minutes,
    directory: Directory = DIRECTORY,
    cooldown: Cooldown = 0.0,
    device: Device = DEVICE,
    decoder_only: Annotated[bool, typer.Option(help="Leave the encoder, and so all latents, as they are.")] = False,
) -> None:
    """Train the autoencoder."""
    autoencoder_stage.train(directory, torch.device(device), minutes, cooldown=cooldown, decoder_only=decoder_only)


@app.command()
def text(minutes: Minutes, directory: Directory = DIRECTORY, cooldown: Cooldown = 0.0, device: Device = DEVICE) -> None:
    """Train the text encoders."""
    text_stage.train(directory, torch.device(device), minutes, cooldown=cooldown)


@app.command()
def transformer(
    minutes: Minutes,
    directory: Directory = DIRECTORY,
    cooldown: Cooldown = 0.0,
    device: Device = DEVICE,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile it first: for calls of an hour.")] = False,
) -> None:
    """Train the transformer on from wherever it is; needs the autoencoder and the text encoders."""
    transformer_stage.train(directory, torch.device(device), minutes, cooldown=cooldown, compiled=compiled)


@app.command()
def go_on(minutes: Minutes, directory: Directory = DIRECTORY, device: Device = DEVICE) -> None:
    """Train whatever is next: the autoencoder to its end, the text encoders to theirs, then the transformer."""
    left = minutes
    stages = ((autoencoder_stage.train, "autoencoder", 60.0, 20.0), (text_stage.train, "text", 7.0, 4.0))
    for train, name, ends, cooldown in stages:
        done = checkpoint_stage.minutes_of(name, directory)
        if done < ends and left > 0:
            train(directory, torch.device(device), min(left, ends - done), cooldown=cooldown, ends=ends)
            left -= checkpoint_stage.minutes_of(name, directory) - done
        if asked_to_stop():
            return
    if left > 0:
        transformer_stage.train(directory, torch.device(device), left)


@app.command()
def judge(
    purpose: Annotated[Purpose, typer.Argument(help="The judge of searches or the one of tables.")],
    minutes: Minutes,
    directory: Directory = DIRECTORY,
    cooldown: Cooldown = 0.0,
    device: Device = DEVICE,
) -> None:
    """Train a judge; needs the autoencoder."""
    judging_stage.train(purpose, directory, torch.device(device), minutes, cooldown=cooldown)


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; held-out prompts if none.")] = None,
    directory: Directory = DIRECTORY,
    pixels: int = 128,
    count: int = 24,
    steps: int = 30,
    guidance: float = 3.0,
    device: Device = DEVICE,
) -> None:
    """Write a sheet of the transformer's pictures."""
    settings = {"pixels": pixels, "count": count, "steps": steps}
    print(sample_stage.sheet(directory, torch.device(device), guidance=guidance, prompts=prompts, **settings))


@app.command()
def publish(directory: Directory = DIRECTORY) -> None:
    """Write the checkpoint that is kept with the recipe, from which training goes on elsewhere."""
    checkpoint_stage.publish(directory)


@app.command()
def evaluate(prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 300) -> None:
    """Judge what the package's weights draw, by steps and sizes."""
    from training.large.evaluation import evaluate as evaluate_all

    evaluate_all(prompts)


@app.command()
def deliver(directory: Directory = DIRECTORY) -> None:
    """Write the weights that come with the package."""
    checkpoint_stage.deliver(directory)


@app.command()
def status(directory: Directory = DIRECTORY, lines: int = 12) -> None:
    """Print the end of the log."""
    print("\n".join((directory / "log.jsonl").read_text().splitlines()[-lines:]))


if __name__ == "__main__":
    stop_when_asked()
    app()
