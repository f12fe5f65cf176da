"""What a stack costs where it saves nothing: an empty one, and caches that never skip, against the plain pipeline."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from common import save
from fastdit.accelerator import Accelerator
from fastdit.caching.coefficients import Coefficients
from fastdit.caching.easycache import EasyCache
from fastdit.caching.first_block_cache import FirstBlockCache
from fastdit.caching.forecast import Taylor
from fastdit.caching.seacache import SeaCache
from fastdit.caching.teacache import TeaCache
from fastdit.errors import NeverFired
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.synthetic import FluxSize, random_call, random_flux
from fastdit.measure.timing import medians, time_interleaved
from fastdit.mini import load_mini
from fastdit.stack import accelerate

BAR = 1.01
MODEL = FluxSize(double_blocks=2, single_blocks=4, heads=4, head_width=64)

#: Far below any change, so that every step is computed with all the bookkeeping of one that might not be.
_NEVER = 1e-9


def stacks(coefficients: Coefficients | str) -> dict[str, list[Accelerator]]:
    """The twins that compute every step."""
    return {
        "empty stack": [],
        "TeaCache": [TeaCache(_NEVER, coefficients)],
        "TeaCache, Taylor 1": [TeaCache(_NEVER, coefficients, forecast=Taylor(1))],
        "FirstBlockCache": [FirstBlockCache(_NEVER)],
        "SeaCache": [SeaCache(_NEVER)],
        "EasyCache": [EasyCache(_NEVER)],
    }


def main(
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 30,
    steps: int = 10,
    tokens_per_side: int = 16,
    mini: Annotated[bool, typer.Option(help="Measure on the embedded pipeline instead of random weights.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures a call, on the embedded pipeline.")] = 8,
    out: Path = Path("benchmarks/results/overhead.json"),
) -> None:
    """Print the ratio twin / plain of paired calls with its interval; exit 1 if a median is above 1.01."""
    pipeline: Any = load_mini() if mini else random_flux(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    made = {} if mini else random_call(pipeline, image_tokens_per_side=tokens_per_side)
    call = {
        **(made or {"prompt": ["an apple on a blue background"] * batch}),
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    warnings.simplefilter("ignore", NeverFired)  # that is what is measured
    twins = {name: accelerate(pipeline, stack) for name, stack in stacks("fastdit-mini").items()}

    def run(target: Any) -> Any:
        return target(**call, generator=torch.Generator().manual_seed(0))

    tasks = {"plain": lambda number: run(pipeline)}
    tasks |= {name: (lambda number, twin=twin: run(twin)) for name, twin in twins.items()}
    seconds = time_interleaved(tasks, rounds=rounds, warmup=3)
    ratios = {name: median_of_ratios(seconds[name], seconds["plain"]) for name in twins}
    print(f"{Environment.capture()}")
    print(f"{rounds} paired rounds of {steps} steps; median seconds {medians(seconds)}")
    for name, ratio in ratios.items():
        print(f"{name} / plain {ratio:.4f}")
    values = {"seconds": seconds, "steps": steps, "tokens": tokens_per_side**2, "ratios": ratios, "bar": BAR}
    save(out, {"model": f"embedded pipeline, {batch} a call" if mini else "random FLUX", **values})
    raise typer.Exit(any(ratio.estimate > BAR for ratio in ratios.values()))


if __name__ == "__main__":
    typer.run(main)
