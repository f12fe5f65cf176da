"""How well seconds are predicted: held-out stacks and sizes, on both embedded pipelines and a random FLUX of 100 M.

`measure` takes costs and truth in turns: a round takes every cost once, then every row once. What is predicted is
predicted from costs alone, of other sizes than the rows'. Exit 1 above a median error of 7 % or a 95th percentile of
15 %. `published` fits the roofline to the published tables, tries it on the rest, and writes its constants.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fastdit import FastditWarning, InvalidConfig, accelerate
from fastdit.bench.cost import CostMeter, probed, undisturbed
from fastdit.bench.grammar import parse_stack
from fastdit.measure.timing import timed
from fastdit.mini import load_mini
from fastdit.mini.prompts import held_out, training
from fastdit.predict import architectures, roofline
from fastdit.predict.estimate import predict
from saving import save
from synthetic import FluxSize, random_call, random_flux

#: Bars of the median and of the 95th percentile of the relative errors.
MEDIAN, HIGH = 0.07, 0.15

SIZES = (160, 224, 320)
CACHES = ("", "Interval 3", "TeaCache .25", "FirstBlockCache .1", "ToCa", "EasyCache .1")
SCHEDULES = {
    "mini": ("ProgressiveResolution 4x", "RALU 4x", "ProgressiveResolution 4x, TeaCache .25"),
    "mini:sd3": ("ProgressiveResolution 3x", "RALU 3x", "ProgressiveResolution 3x, Interval 2"),
    "random FLUX, 100 M": ("ProgressiveResolution 4x", "ProgressiveResolution 4x, Interval 2"),
}
WIDTH = FluxSize(double_blocks=2, single_blocks=6, heads=12, head_width=64)


@dataclass
class Row:
    """A stack at a size that no cost was taken at."""

    stack: str
    pixels: int
    steps: int | None
    twin: Any
    seconds: list[float]


class Trial:
    """A pipeline, its costs and its rows."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        if name.startswith("random"):
            self.pipeline = random_flux(WIDTH)
            call = random_call(self.pipeline, image_tokens_per_side=16)
            self.calls = [{**call}, {**call}]
            stacks = (*CACHES, *SCHEDULES[name])
        else:
            self.pipeline = load_mini("sd3" if name.endswith("sd3") else "flux")
            self.pipeline.set_progress_bar_config(disable=True)
            self.calls = [{"prompt": prompt} for prompt in (*training(1, 0), *held_out(1, 0))]
            stacks = (*CACHES, *SCHEDULES[name])
        self.meter = CostMeter(self.pipeline, self.calls[0])
        self.rows = list(self._rows(stacks))

    def _rows(self, stacks: tuple[str, ...]) -> Iterator[Row]:
        for text in stacks:
            stack = parse_stack(text)
            steps = self.steps if stack.schedule is None else None
            for pixels in SIZES:
                try:
                    twin = accelerate(self.pipeline, stack)
                    twin.fastdit.plan(pixels, pixels, steps)
                except InvalidConfig:  # a size that does not halve, a model without coefficients
                    continue
                # What a twin learns of the model at its first forward is done once, and no part of a call's cost.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FastditWarning)
                    own = {} if steps is None else {"num_inference_steps": steps}
                    twin(**{**self.calls[1], "height": pixels, "width": pixels, **own})
                yield Row(text, pixels, steps, twin, [])

    def round(self, number: int) -> None:
        """Take every cost and every row once."""
        self.meter.round()
        for row in self.rows:
            call = {**self.calls[1], "height": row.pixels, "width": row.pixels}
            if row.steps is not None:
                call["num_inference_steps"] = row.steps
            generator = torch.Generator().manual_seed(7 + number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FastditWarning)
                seconds, _ = timed(lambda _, row=row, call=call, g=generator: row.twin(**call, generator=g), number)
            row.seconds.append(seconds)

    def outcome(self) -> dict[str, Any]:
        """Predict every row, and say how far off that is."""
        model = self.meter.fitted()
        for text, steps in {(row.stack, row.steps): None for row in self.rows}:
            stack = parse_stack(text)
            if stack.step_cache is not None or stack.token_cache is not None:
                model = probed(self.meter, model, stack, steps)
        rows = []
        for row in self.rows:
            said = predict(model, self.pipeline, row.twin.fastdit.plan(row.pixels, row.pixels, row.steps)).seconds
            took = undisturbed(row.seconds)
            rows.append(
                {
                    "stack": row.stack or "plain",
                    "pixels": row.pixels,
                    "predicted": asdict(said),
                    "seconds": row.seconds,
                    "error": abs(said.value / took - 1.0),
                    "error_of_median": abs(said.value / median(row.seconds) - 1.0),
                }
            )
            print(f"{self.name}, {row.stack or 'plain'}, {row.pixels} px: {said:.3f} said, {took:.3f} s", flush=True)
        return {"pipeline": self.name, "fit_error": model.error, "measured_tokens": list(model.sizes), "rows": rows}


app = typer.Typer(no_args_is_help=True)


@app.command()
def measure(
    rounds: Annotated[int, typer.Option(help="Of costs and truth in turns.")] = 3,
    steps: Annotated[int, typer.Option(help="Of stacks without a schedule.")] = 12,
    only: Annotated[str, typer.Option(help="A part of the pipelines' names.")] = "",
    out: Path = Path("benchmarks/results/prediction.json"),
) -> None:
    """Take costs and truth in turns, predict, and save every row with its error."""
    start, load, found = time.monotonic(), [os.getloadavg()[0]], []
    for name in (name for name in SCHEDULES if only in name):
        trial = Trial(name, steps if not name.startswith("random") else max(steps // 2, 6))
        for number in range(rounds):
            trial.round(number)
            load.append(os.getloadavg()[0])
            print(f"{name}: round {number + 1} of {rounds}, {time.monotonic() - start:.0f} s", flush=True)
        found.append(trial.outcome())
        _say(name, [row["error"] for row in found[-1]["rows"]])
    errors = [row["error"] for one in found for row in one["rows"]]
    quality = {"median": float(np.median(errors)), "95th": float(np.quantile(errors, 0.95))}
    save(out, {"load": load, "errors": quality, "pipelines": found})
    _say("all", errors)
    sys.exit(int(quality["median"] > MEDIAN or quality["95th"] > HIGH))


def _say(name: str, errors: list[float]) -> None:
    print(f"{name}: median error {np.median(errors):.1%}, 95th percentile {np.quantile(errors, 0.95):.1%}", flush=True)


@app.command()
def published() -> None:
    """Fit the roofline, try it on what it was not fitted to, and write both into the published facts."""
    path = Path(architectures.__file__).parent / "published.json"
    for trial in roofline.trials():
        kind = "fitted" if trial.fitted else "held out"
        print(f"{kind:9} {trial.what}: {trial.said:.4g} said, {trial.measured:.4g} published, {trial.error:.1%} off")
    found = {**asdict(roofline.fitted()), "error": roofline.held_out_error()}
    text = path.read_text(encoding="utf-8")
    before = text[text.index('  "roofline": ') :]
    path.write_text(text.replace(before, f'  "roofline": {json.dumps(found)}\n}}\n'), encoding="utf-8")
    print(f"held-out error {found['error']:.1%}; written to {path}")


if __name__ == "__main__":
    app()
