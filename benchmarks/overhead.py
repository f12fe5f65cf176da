"""What a stack costs where it saves nothing: an empty one, and caches that never skip, against the plain pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from common import keep_freed_memory
from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.errors import NeverFired
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import mean, median_of_ratios
from fastdit.measure.timing import medians, time_interleaved
from fastdit.mini import load_mini
from fastdit.step_cache.coefficients import Coefficients
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.easycache import EasyCache
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.seacache import SeaCache
from fastdit.step_cache.gates.teacache import TeaCache
from saving import save
from synthetic import FluxSize, random_call, random_flux

BAR = 1.01
MODEL = FluxSize(double_blocks=2, single_blocks=4, heads=4, head_width=64)

#: Calls of the plain pipeline in a round. Every twin is compared to their median, whose noise all ratios share.
PLAIN = 3

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
    rounds: Annotated[int, typer.Option(help="Paired rounds of a process.")] = 30,
    processes: Annotated[int, typer.Option(help="Processes that measure one after another.")] = 1,
    steps: int = 10,
    tokens_per_side: int = 16,
    mini: Annotated[bool, typer.Option(help="Measure on the embedded pipeline instead of random weights.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures a call, on the embedded pipeline.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order in a round; each process has its own.")] = 0,
    out: Path = Path("benchmarks/results/overhead.json"),
) -> None:
    """Print the ratio twin / plain of paired calls with its interval; exit 1 if one is above 1.01.

    Where tensors come to lie in memory is settled once a process and moves a ratio by a hundredth either way, as does
    which task follows which: with several processes, each with an order of its own, the ratio is the mean of their
    medians, and its interval that of a draw of processes.
    """
    if processes > 1:
        seeds = range(seed, seed + processes)
        each = [_in_a_process(rounds, steps, tokens_per_side, mini, batch, own) for own in seeds]
        ratios = {name: mean([one[name] for one in each]) for name in each[0]}
        values: dict[str, Any] = {"each": each}
    else:
        seconds = measure(rounds, steps, tokens_per_side, mini, batch, seed)
        print(f"median seconds {medians(seconds)}")
        ratios = {name: median_of_ratios(seconds[name], seconds["plain"]) for name in seconds if name != "plain"}
        values = {"seconds": seconds}
    print(f"{Environment.capture()}; {processes} processes of {rounds} paired rounds of {steps} steps")
    for name, ratio in ratios.items():
        print(f"{name} / plain {ratio:.4f}")
    model = f"embedded pipeline, {batch} a call" if mini else "random FLUX"
    values |= {"processes": processes, "rounds": rounds}
    values |= {"model": model, "steps": steps, "tokens": tokens_per_side**2, "ratios": ratios, "bar": BAR}
    save(out, values)
    raise typer.Exit(any(ratio.estimate > BAR for ratio in ratios.values()))


def measure(
    rounds: int, steps: int, tokens_per_side: int, mini: bool, batch: int, seed: int
) -> dict[str, tuple[float, ...]]:
    """The seconds of the plain pipeline and of every twin, round by round."""
    keep_freed_memory()
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

    plain = [f"plain, call {number}" for number in range(1, PLAIN + 1)]
    tasks = {name: (lambda number, target=target: run(target)) for name, target in twins.items()}
    tasks |= {name: lambda number: run(pipeline) for name in plain}
    seconds = time_interleaved(tasks, rounds=rounds, warmup=2, seed=seed)
    calls = [seconds[name] for name in plain]
    return {"plain": tuple(map(median, zip(*calls, strict=True))), **{name: seconds[name] for name in twins}}


def _in_a_process(rounds: int, steps: int, tokens_per_side: int, mini: bool, batch: int, seed: int) -> dict[str, float]:
    """The ratios that a process of their own finds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "overhead.json"
        options = {"rounds": rounds, "steps": steps, "tokens-per-side": tokens_per_side, "batch": batch, "seed": seed}
        options["out"] = out
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, __file__, *arguments, *(["--mini"] if mini else [])]
        finished = subprocess.run(command, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"a process that measures failed:\n{finished.stderr}")
        ratios = json.loads(out.read_text(encoding="utf-8"))["ratios"]
    return {name: ratio["estimate"] for name, ratio in ratios.items()}


if __name__ == "__main__":
    typer.run(main)
