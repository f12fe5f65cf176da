"""Quality at equal time on the embedded pipeline: fewer plain steps, caches, schedules, and stacks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from common import clock, compare
from fastdit.accelerator import Accelerator
from fastdit.measure.experiment import Configuration, plain
from fastdit.measure.table import rich_table
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.stack import Stack
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.teacache import TeaCache
from measurements import load

RESULTS = Path("benchmarks/results")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def configurations() -> list[Configuration]:
    """The plain runs that every method must beat, and the methods."""
    line = Taylor(1)
    caches: dict[str, tuple[list[Accelerator], int]] = {
        "TeaCache .2": ([TeaCache(0.2)], 50),
        "TeaCache .2, Taylor": ([TeaCache(0.2, forecast=line)], 50),
        "TeaCache .4, Taylor": ([TeaCache(0.4, forecast=line)], 50),
        "TeaCache .6, Taylor": ([TeaCache(0.6, forecast=line)], 50),
        "FirstBlockCache .3, Taylor": ([FirstBlockCache(0.3, forecast=line)], 50),
        "TeaCache .4, Taylor, of 20 steps": ([TeaCache(0.4, forecast=line)], 20),
        "TeaCache .3 of 15 steps": ([TeaCache(0.3)], 15),
        "TeaCache .25 of 12 steps": ([TeaCache(0.25)], 12),
        "FirstBlockCache .3 of 20 steps": ([FirstBlockCache(0.3)], 20),
    }
    schedules: dict[str, list[Accelerator]] = {
        "ProgressiveResolution 4x": [ProgressiveResolution("4x")],
        "ProgressiveResolution 5x": [ProgressiveResolution("5x")],
        "ProgressiveResolution 7x": [ProgressiveResolution("7x")],
        "ProgressiveResolution 10x": [ProgressiveResolution("10x")],
        "ProgressiveResolution 4x + TeaCache .2": [ProgressiveResolution("4x"), TeaCache(0.2)],
        "ProgressiveResolution 4x + TeaCache .2, Taylor": [ProgressiveResolution("4x"), TeaCache(0.2, forecast=line)],
        "ProgressiveResolution 5x + TeaCache .2, Taylor": [ProgressiveResolution("5x"), TeaCache(0.2, forecast=line)],
        "ProgressiveResolution 7x + TeaCache .2, Taylor": [ProgressiveResolution("7x"), TeaCache(0.2, forecast=line)],
    }
    return [
        *map(plain, (50, 15, 10, 7, 5)),
        *(Configuration(name, Stack(stack), {"num_inference_steps": steps}) for name, (stack, steps) in caches.items()),
        *(Configuration(name, Stack(stack)) for name, stack in schedules.items()),
    ]


def fast_configurations() -> list[Configuration]:
    """What is about six times faster and more: caches alone, on few steps too, beside a schedule with a cache."""
    line = Taylor(1)
    coarse = {"ends": (0.5,), "starts": (0.15,), "lift": PixelLift()}
    alone: dict[str, tuple[list[Accelerator], int]] = {
        "TeaCache .6, Taylor, of 50 steps": ([TeaCache(0.6, forecast=line)], 50),
        "TeaCache .4, Taylor, of 20 steps": ([TeaCache(0.4, forecast=line)], 20),
        "TeaCache .3 of 15 steps": ([TeaCache(0.3)], 15),
        "TeaCache .25 of 12 steps": ([TeaCache(0.25)], 12),
    }
    both: dict[str, list[Accelerator]] = {
        "ProgressiveResolution 12 + 3 steps + TeaCache .16, Taylor": [
            ProgressiveResolution(steps=(12, 3), **coarse),
            TeaCache(0.16, forecast=line),
        ],
        "ProgressiveResolution 10 + 3 steps + TeaCache .2, Taylor": [
            ProgressiveResolution(steps=(10, 3), **coarse),
            TeaCache(0.2, forecast=line),
        ],
        "ProgressiveResolution 12 + 3 steps + TeaCache .2, Taylor": [
            ProgressiveResolution(steps=(12, 3), **coarse),
            TeaCache(0.2, forecast=line),
        ],
        "ProgressiveResolution 6 + 3 steps": [ProgressiveResolution(steps=(6, 3), **coarse)],
    }
    return [
        *map(plain, (50, 8, 7, 6, 5)),
        *(Configuration(name, Stack(stack), {"num_inference_steps": steps}) for name, (stack, steps) in alone.items()),
        *(Configuration(name, Stack(stack)) for name, stack in both.items()),
    ]


FastOption = Annotated[bool, typer.Option(help="What is six times faster and more, instead of everything.")]
OutOption = Annotated[Path, typer.Option(help="The JSON file.")]


@app.command()
def pictures(
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 200,
    batch: int = 8,
    seed: int = 0,
    first: Annotated[int, typer.Option(help="Held-out prompts to leave out at the start.")] = 0,
    fast: FastOption = False,
    out: OutOption = RESULTS / "quality.json",
) -> None:
    """Make and score the pictures of everything; the seconds are of a machine as it is."""
    chosen = fast_configurations() if fast else configurations()
    results = compare(chosen, title="quality at equal time", prompts=prompts, batch=batch, seed=seed, first=first)
    Console(width=200).print(rich_table(results))
    results.save(out)


@app.command(name="clock")
def clock_(
    rounds: Annotated[int, typer.Option(help="Rounds in turns, of the pictures' first prompts.")] = 6,
    fast: FastOption = False,
    out: OutOption = RESULTS / "quality.json",
) -> None:
    """Time everything in turns, write the seconds into the results, and print them."""
    chosen = fast_configurations() if fast else configurations()
    results = clock(chosen, load(out), rounds=rounds)
    Console(width=200).print(rich_table(results))
    results.save(out)


if __name__ == "__main__":
    np.seterr(all="raise")
    app()
