"""FLOPs of plain and RALU runs, counted on the meta device, beside the paper's own accounting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from counting import RunFlops, Stage, stages_of
from fastdit.schedule.presets import RALU_PRESETS
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from saving import save

TERA = 1e12
RESULTS = Path("benchmarks/results")


def main(
    model: Annotated[str, typer.Option(help="An architecture of benchmarks/architectures.py.")] = "flux-dev",
    pixels: int = 1024,
    text_tokens: Annotated[int | None, typer.Option(help="Tokens of the T5 encoder; the model's own.")] = None,
    plain_steps: Annotated[int | None, typer.Option(help="Steps of the plain run; the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file; one by the model's name in the results.")] = None,
) -> None:
    """Print TFLOPs with attention (the transformer) and by the paper's accounting (linear layers, all parts)."""
    counter = RunFlops(model, height=pixels, width=pixels, text_tokens=text_tokens)
    side = pixels // counter.architecture.patch_pixels
    steps = plain_steps or counter.architecture.steps
    runs = {f"plain, {steps} steps": [Stage(steps, counter.image_tokens)]}
    for preset in counter.architecture.presets:
        runs[f"ProgressiveResolution {preset}"] = stages_of(ProgressiveResolution(preset).plan(side, side, None))
        if preset in RALU_PRESETS:
            runs[f"RALU {preset}"] = stages_of(RALU(preset).plan(side, side, None))
    rows = {
        name: {"transformer": counter.transformer(stages).total / TERA, "published": counter.published(stages) / TERA}
        for name, stages in runs.items()
    }
    table = Table(title=f"{model}, {pixels} px, {counter.text_tokens} text tokens: TFLOPs (ratio to plain)")
    for heading in ("run", "transformer, attention included", "as the paper counts"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.1f} ({first[key] / row[key]:.2f}x)" for key in row))
    Console().print(table)
    name = "flops.json" if model == "flux-dev" else f"flops-{model}.json"
    data = {"model": model, "pixels": pixels, "text_tokens": counter.text_tokens, "tflops": rows}
    save(out or RESULTS / name, data)


if __name__ == "__main__":
    typer.run(main)
