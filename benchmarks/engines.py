"""Engines on a CPU: build seconds, seconds a step and error, at the shapes of RALU's three stages.

Each configuration runs the transformer of one random FLUX on the same inputs; the error is that of its output to the
same model in float32. A compiled model in bfloat16 differs from an eager one by rounding less, so errors are not taken
to the eager output.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdit.acceleration import accelerate
from fastdit.engine.aot import AOT
from fastdit.engine.base import Engine
from fastdit.engine.compile import Compile
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.timing import medians, time_interleaved
from fastdit.schedule.ralu import RALU
from saving import save
from synthetic import FluxSize, random_call, random_flux

MODEL = FluxSize(double_blocks=4, single_blocks=8, heads=9, head_width=64)
SPEED_BAR, ERROR_BAR, START_BAR = 1.25, 1.2, 3.0
ENGINES: dict[str, Engine] = {
    "Compile": Compile(),
    "Compile, torch's attention": Compile(attention="torch"),
    "Compile, packed": Compile(packed=True),
    "AOT": AOT(),
}
if importlib.util.find_spec("fastdit_openvino") and importlib.util.find_spec("openvino"):
    from fastdit_openvino import OpenVINO

    ENGINES["OpenVINO, bf16"] = OpenVINO(precision="bf16")

app = typer.Typer()


def stage_inputs(pipeline: Any, side: int, text_tokens: int) -> list[dict[str, Any]]:
    """The arguments of the transformer's first forward in each of the three stages of RALU's published recipe."""
    seen: dict[int, dict[str, Any]] = {}
    twin = accelerate(pipeline, [RALU.paper("4x")])
    call = random_call(pipeline, image_tokens_per_side=side, text_tokens=text_tokens)

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # RALU's positions are put in place inside the twin, and this hook sees them there.
        seen.setdefault(twin.fastdit.active.stage, dict(kwargs))

    handle = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        twin(**call, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))
    finally:
        handle.remove()
    return [seen[stage] for stage in sorted(seen)]


def forward(twin: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """One forward in a run of one step."""
    with torch.no_grad(), twin.fastdit.run(1):
        output: torch.Tensor = twin(**{**arguments, "return_dict": False})[0]
    return output


@app.command()
def measure(
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 10,
    tokens_per_side: int = 32,
    text_tokens: int = 64,
    dtype: str = "bfloat16",
    directory: Annotated[Path | None, typer.Option(help="Where engines are kept; a new folder if left out.")] = None,
    start: Annotated[bool, typer.Option(help="Also time the first picture of a first and a second process.")] = True,
    only: Annotated[
        str, typer.Option(help="Engines whose names match this; they join the results that are there.")
    ] = "",
    out: Path = Path("benchmarks/results/engines.json"),
) -> None:
    """Print the table; exit 1 where the best engine is slower than the bar, less exact, or starts too slowly.

    Ratios are to the eager model of the same run.
    """
    chosen = {name: engine for name, engine in ENGINES.items() if re.search(only, name)}
    kept = str(directory or tempfile.mkdtemp(prefix="engines-"))
    pipeline = random_flux(MODEL, dtype=getattr(torch, dtype))
    module = pipeline.transformer.eval()
    exact = copy.deepcopy(module).float()
    twins = {"eager": accelerate(module, [])}
    for name, engine in chosen.items():
        twins[name] = accelerate(module, [type(engine)(**{**vars(engine), "directory": kept})])
    rows: list[dict[str, Any]] = []
    for stage, arguments in enumerate(stage_inputs(pipeline, tokens_per_side, text_tokens)):
        floats = {
            name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
        with torch.no_grad():
            reference = exact(**{**floats, "return_dict": False})[0]
        errors, builds = {}, {}
        for name, twin in twins.items():
            began = time.perf_counter()
            found = forward(twin, arguments).float()
            builds[name] = time.perf_counter() - began
            errors[name] = float((found - reference).norm() / reference.norm())
        tasks = {name: (lambda _, twin=twin, given=arguments: forward(twin, given)) for name, twin in twins.items()}
        seconds = time_interleaved(tasks, rounds=rounds, warmup=2)
        ratios = {name: median_of_ratios(seconds["eager"], seconds[name]) for name in chosen}
        tokens = next(iter(arguments.values())).shape[1]
        print(f"stage {stage + 1}, {tokens} image tokens; median seconds {medians(seconds)}")
        for name, ratio in ratios.items():
            print(
                f"  {name}: {ratio.estimate:.3f} times eager [{ratio.low:.3f}, {ratio.high:.3f}], first call "
                f"{builds[name]:.1f} s, error {errors[name]:.2e} (eager {errors['eager']:.2e})"
            )
        row = {"seconds": seconds, "ratios": ratios, "errors": errors, "first": builds}
        rows.append({"stage": stage, "tokens": tokens, **json.loads(json.dumps(row, default=dataclasses.asdict))})
    starts = {name: _starts(name, tokens_per_side, text_tokens, dtype) for name in chosen} if start else {}
    for name, (first, second) in starts.items():
        print(f"{name}: first picture after {first:.1f} s in a first process, {second:.1f} s in a second")
    if only:
        before = json.loads(out.read_text(encoding="utf-8"))
        rows = [_joined(old, new) for old, new in zip(before["stages"], rows, strict=True)]
        starts = {name: tuple(times) for name, times in (before["starts"] | starts).items() if name in ENGINES}
    best = min(max(ratio["estimate"] for ratio in row["ratios"].values()) for row in rows)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{Environment.capture()}; {parameters / 1e6:.0f} M parameters")
    print(f"at its slowest stage the best engine is {best:.3f} times eager")
    bars = {"speed": SPEED_BAR, "error": ERROR_BAR, "start": START_BAR}
    save(out, {"dtype": dtype, "parameters": parameters, "stages": rows, "starts": starts, "bars": bars})
    exact_enough = all(error <= ERROR_BAR * row["errors"]["eager"] for row in rows for error in row["errors"].values())
    quick = all(first >= START_BAR * second for first, second in starts.values())
    raise typer.Exit(best < SPEED_BAR or not exact_enough or not quick)


def _joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put the engines of a new row in their places beside those of an old one, whose eager model stays.

    Raises `ValueError` where that is not the same model on the same input.
    """
    if not math.isclose(old["errors"]["eager"], new["errors"]["eager"], rel_tol=1e-6):
        raise ValueError("rows join those of the same model and input alone; measure all engines anew")
    parts = {}
    for part in ("seconds", "ratios", "errors", "first"):
        values = new[part] | {name: old[part][name] for name in old[part] if name == "eager" or name not in new[part]}
        parts[part] = {name: values[name] for name in ("eager", *ENGINES) if name in values}
    return {**old, **parts}


@app.command(hidden=True)
def first_picture(name: str, directory: str, tokens_per_side: int, text_tokens: int, dtype: str) -> None:
    """Print the seconds from the call to the first picture of RALU's shortest run with an engine, in this process."""
    pipeline = random_flux(MODEL, dtype=getattr(torch, dtype))
    call = random_call(pipeline, image_tokens_per_side=tokens_per_side, text_tokens=text_tokens)
    engine = ENGINES[name]
    twin = accelerate(pipeline, [RALU.paper("4x"), type(engine)(**{**vars(engine), "directory": directory})])
    began = time.perf_counter()
    twin(**call, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    print(json.dumps(time.perf_counter() - began))


def _starts(name: str, tokens_per_side: int, text_tokens: int, dtype: str) -> tuple[float, float]:
    """Seconds to the first picture in a process that finds nothing, and in the next one."""
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        arguments = [
            sys.executable,
            __file__,
            "first-picture",
            name,
            folder,
            str(tokens_per_side),
            str(text_tokens),
            dtype,
        ]
        outputs = [subprocess.run(arguments, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    first, second = (float(json.loads(output.splitlines()[-1])) for output in outputs)
    return first, second


if __name__ == "__main__":
    app()
