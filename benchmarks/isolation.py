"""Where RALU's loss on the embedded pipeline comes from: the judge's parts, with one setting changed at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.measure.statistics import mean, mean_difference
from fastdit.mini import load_mini
from fastdit.mini.judge import load_judge
from fastdit.mini.prompts import held_out, parse
from fastdit.record import RunRecord
from fastdit.schedule.ralu import RALU
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.teacache import TeaCache
from saving import save

BASELINE = "12 steps"


def rows() -> dict[str, tuple[list[Accelerator], int | None]]:
    """Every row: a stack and a step count (None is the schedule's own)."""
    late = (0.45, 0.60)
    return {
        **{f"{steps} steps": ([], steps) for steps in (50, 12, 8, 7)},
        "RALU 4x": ([RALU.paper("4x", fidelity="exact")], None),
        "RALU 4x, restart 3": ([RALU.paper("4x", fidelity="exact", restart=3.0)], None),
        "RALU 4x, restart 30": ([RALU.paper("4x", fidelity="exact", restart=30.0)], None),
        "RALU 4x, 14 last steps": ([RALU.paper("4x", fidelity="exact", steps=(5, 6, 14))], None),
        "RALU 4x, switches at .45, .60": ([RALU.paper("4x", fidelity="exact", ends=late)], None),
        "RALU 4x + TeaCache .2": ([RALU.paper("4x", fidelity="exact"), TeaCache(0.2)], None),
        "RALU 4x + TeaCache .2, carried": (
            [RALU.paper("4x", fidelity="exact"), TeaCache(0.2, stage_change="carry")],
            None,
        ),
        "TeaCache .3, Taylor": ([TeaCache(0.3, forecast=Taylor(1))], 50),
        "TeaCache .4, Taylor, of 20 steps": ([TeaCache(0.4, forecast=Taylor(1))], 20),
    }


def main(
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 128,
    batch: int = 16,
    seed: int = 0,
    out: Path = Path("benchmarks/results/isolation.json"),
) -> None:
    """Make every row's pictures from the same noise and read them part by part."""
    pipeline = load_mini(torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge()
    asked = held_out(prompts, seed, background=True)
    read: dict[str, dict[str, Any]] = {}
    runs: dict[str, RunRecord] = {}
    for name, (stack, steps) in rows().items():
        twin = accelerate(pipeline, stack)
        count = {} if steps is None else {"num_inference_steps": steps}
        pictures: list[Any] = []
        for start in range(0, prompts, batch):
            generators = [torch.Generator().manual_seed(seed + place) for place in range(start, start + batch)]
            pictures += twin(list(asked[start : start + batch]), generator=generators, **count).images
        parts = judge.parts(pictures, asked)
        read[name] = {"judge": judge.score(pictures, asked).numpy(), "intact": parts["intact"].numpy()}
        read[name]["objects"] = parts["objects"].numpy()
        runs[name] = twin.fastdit.last_run
        print(f"{name}: {read[name]['judge'].mean():.3f}", file=sys.stderr, flush=True)
    single = np.array([parse(prompt).kind == "single" for prompt in asked])
    table = Table("run", "fewer FLOPs", "judge", f"judge - {BASELINE}", "intact, singles", f"intact - {BASELINE}")
    results = []
    for name, values in read.items():
        row = {
            "name": name,
            "fewer_flops": runs["50 steps"].flops / runs[name].flops,
            "computed": runs[name].computed,
            "forwards": len(runs[name].steps),
            "restart": _restart(runs[name]),
            "judge": mean(values["judge"]),
            "judge_difference": mean_difference(values["judge"], read[BASELINE]["judge"]),
            "intact": mean(values["intact"][single]),
            "intact_difference": mean_difference(values["intact"][single], read[BASELINE]["intact"][single]),
            "objects": mean(values["objects"][single]),
        }
        results.append(row)
        shown = (row[key] for key in ("judge", "judge_difference", "intact", "intact_difference"))
        table.add_row(name, f"{row['fewer_flops']:.2f}", *(f"{value:.3f}" for value in shown))
    Console(width=150).print(table)
    save(out, {"prompts": prompts, "seed": seed, "baseline": BASELINE, "rows": results})


def _restart(record: RunRecord) -> float | None:
    """Give the noise level at which the last of several stages starts."""
    last = record.steps[-1].stage
    return None if last == 0 else next(step.sigma for step in record.steps if step.stage == last)


if __name__ == "__main__":
    typer.run(main)
