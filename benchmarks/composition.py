"""Whether accelerators compose: a schedule, TeaCache and an engine together against the product of their own speed-ups.

    predicted = speed-up of ProgressiveResolution x that of TeaCache over it alone x that of the engine alone

Parts that touch different things should multiply: fewer tokens, fewer steps, faster steps. TeaCache's part is measured
inside the schedule's run, which decides how many steps it may skip; the engine's is measured on the plain run.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdit.acceleration import accelerate
from fastdit.engine.compile import Compile
from fastdit.errors import NeverFired
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.timing import medians, time_interleaved
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.step_cache.coefficients import Coefficients
from fastdit.step_cache.gates.teacache import TeaCache
from saving import save
from synthetic import FluxSize, random_call, random_flux

BAR = 0.9
MODEL = FluxSize(double_blocks=4, single_blocks=8, heads=9, head_width=64)


def main(
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of the runs without ProgressiveResolution.")] = 50,
    tokens_per_side: int = 32,
    dtype: str = "bfloat16",
    threshold: float = 0.25,
    packed: Annotated[bool, typer.Option(help="Pack the weights for the processor.")] = False,
    directory: Annotated[Path | None, typer.Option(help="Where engines are kept; a new folder if left out.")] = None,
    out: Path = Path("benchmarks/results/composition.json"),
) -> None:
    """Print the measured speed-up beside the parts' product; exit 1 where it is below 0.9 of it, outside noise."""
    warnings.simplefilter("ignore", NeverFired)
    pipeline = random_flux(MODEL, dtype=getattr(torch, dtype))
    call = random_call(pipeline, image_tokens_per_side=tokens_per_side, text_tokens=64)
    # Random weights have no published coefficients: the change of the signal itself is what is accumulated.
    cache = TeaCache(threshold, Coefficients((1.0, 0.0)))
    engine = Compile(packed=packed, directory=str(directory or tempfile.mkdtemp(prefix="engines-")))
    stacks = {
        "plain": [],
        "ProgressiveResolution": [ProgressiveResolution("4x")],
        "engine": [engine],
        "ProgressiveResolution, TeaCache": [ProgressiveResolution("4x"), cache],
        "ProgressiveResolution, TeaCache, engine": [ProgressiveResolution("4x"), cache, engine],
    }
    twins = {name: accelerate(pipeline, stack) for name, stack in stacks.items()}
    embeds = {name: value for name, value in call.items() if name.endswith("embeds")}
    for name in ("engine", "ProgressiveResolution, TeaCache, engine"):
        print(name, twins[name].fastdit.warmup(call["height"], call["width"], progress=False, **embeds))

    def run(name: str) -> None:
        count = {} if "ProgressiveResolution" in name else {"num_inference_steps": steps}
        twins[name](**call, **count, output_type="latent", generator=torch.Generator().manual_seed(0))

    tasks = {name: (lambda _, name=name: run(name)) for name in twins}
    seconds = time_interleaved(tasks, rounds=rounds, warmup=1)
    pairs = {
        "ProgressiveResolution": ("plain", "ProgressiveResolution"),
        "TeaCache": ("ProgressiveResolution", "ProgressiveResolution, TeaCache"),
        "engine": ("plain", "engine"),
        "together": ("plain", "ProgressiveResolution, TeaCache, engine"),
    }
    speed_ups = {name: median_of_ratios(seconds[slow], seconds[fast]) for name, (slow, fast) in pairs.items()}
    # Measured over predicted, round by round, so that the interval holds the noise of all the parts.
    names = ("plain", "ProgressiveResolution, TeaCache", "engine", "ProgressiveResolution, TeaCache, engine")
    turns = list(zip(*(seconds[name] for name in names), strict=True))
    predicted = [(plain / cached) * (plain / faster) for plain, cached, faster, _ in turns]
    measured = [plain / together for plain, *_, together in turns]
    share = median_of_ratios(measured, predicted)
    records = {name: twin.fastdit.last_run for name, twin in twins.items()}
    print(f"{Environment.capture()}; median seconds {medians(seconds)}")
    for name, speed_up in speed_ups.items():
        print(f"{name}: {speed_up:.3f} times")
    print(f"together / product of the parts: {share:.3f}")
    skipped = {name: record.skipped for name, record in records.items()}
    save(
        out,
        {"seconds": seconds, "speed_ups": speed_ups, "share": share, "skipped": skipped, "steps": steps, "bar": BAR},
    )
    raise typer.Exit(share.high < BAR)


if __name__ == "__main__":
    typer.run(main)
