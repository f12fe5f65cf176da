"""What an empty stack costs: the plain FluxPipeline against its twin, in turns, on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from common import save
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.synthetic import FluxSize, random_call, random_flux
from fastdit.measure.timing import medians, time_interleaved
from fastdit.stack import accelerate

BAR = 1.01
MODEL = FluxSize(double_blocks=2, single_blocks=4, heads=4, head_width=64)


def main(
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 30,
    steps: int = 10,
    tokens_per_side: int = 16,
    out: Path = Path("benchmarks/results/overhead.json"),
) -> None:
    """Print the ratio twin / plain of paired calls with its interval; exit 1 if its median is above 1.01."""
    pipeline = random_flux(MODEL)
    call = {
        **random_call(pipeline, image_tokens_per_side=tokens_per_side),
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    twin = accelerate(pipeline)

    def run(target: object) -> object:
        return target(**call, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]

    seconds = time_interleaved(
        {"plain": lambda number: run(pipeline), "twin": lambda number: run(twin)}, rounds=rounds, warmup=3
    )
    ratio = median_of_ratios(seconds["twin"], seconds["plain"])
    print(f"{Environment.capture()}")
    print(f"{rounds} paired rounds of {steps} steps: {medians(seconds)} s; twin / plain {ratio:.4f}")
    save(out, {"seconds": seconds, "steps": steps, "tokens": tokens_per_side**2, "ratio": ratio, "bar": BAR})
    raise typer.Exit(ratio.estimate > BAR)


if __name__ == "__main__":
    typer.run(main)
