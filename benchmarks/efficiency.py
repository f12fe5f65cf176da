"""How much of a schedule's saving in FLOPs arrives on the clock: a random FLUX of 100 M parameters at 1024 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdit.acceleration import accelerate
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.timing import medians, time_interleaved
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.stack import Stack
from saving import save
from synthetic import FluxSize, random_call, random_flux

BAR = 0.9
MODEL = FluxSize(double_blocks=4, single_blocks=8, heads=9, head_width=64)


def main(
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 5,
    preset: str = "4x",
    dtype: str = "float32",
    steps: Annotated[int, typer.Option(help="Steps of the plain run.")] = 50,
    out: Path = Path("benchmarks/results/efficiency.json"),
) -> None:
    """Print the wall-clock speed-up over the plain run and its share of the FLOPs speed-up; exit 1 below 0.9."""
    pipeline = random_flux(MODEL, dtype=getattr(torch, dtype))
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    call = random_call(pipeline, image_tokens_per_side=32, text_tokens=64)
    twins = {"plain": accelerate(pipeline, Stack()), preset: accelerate(pipeline, [ProgressiveResolution(preset)])}

    def run(name: str) -> object:
        count = {"num_inference_steps": steps} if name == "plain" else {}
        return twins[name](**call, **count, generator=torch.Generator().manual_seed(0))

    tasks = {name: (lambda number, name=name: run(name)) for name in twins}
    seconds = time_interleaved(tasks, rounds=rounds, warmup=1, progress=lambda done, total: print(f"{done}/{total}"))
    speed_up = median_of_ratios(seconds["plain"], seconds[preset])
    flops = {name: twin.fastdit.last_run.flops for name, twin in twins.items()}
    flops_speed_up = flops["plain"] / flops[preset]
    share = speed_up.estimate / flops_speed_up
    print(Environment.capture())
    print(f"{parameters / 1e6:.0f} M parameters, 1024 image tokens, {dtype}; median seconds {medians(seconds)}")
    clock = f"{speed_up:.2f} times on the clock, {flops_speed_up:.2f} times in FLOPs: {share:.3f} of it"
    print(f"ProgressiveResolution {preset}: {clock}")
    values = {"seconds": seconds, "flops": flops, "parameters": parameters, "speed_up": speed_up, "share": share}
    save(out, {"preset": preset, "dtype": dtype, "steps": steps, "bar": BAR, **values})
    raise typer.Exit(share < BAR)


if __name__ == "__main__":
    typer.run(main)
