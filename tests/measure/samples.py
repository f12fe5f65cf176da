"""A small made-up measurement, for the tests of results and report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdit.measure.environment import Environment
from fastdit.measure.experiment import save_images
from fastdit.measure.results import ConfigurationResult, Metric, Results
from fastdit.measure.statistics import mean

PROMPTS = ("a small red apple on the left", "a <star> & a car", "a fish")


def step(number: int, stage: int, tokens: int, action: str = "computed") -> dict[str, Any]:
    """One step of a record, as `StepRecord.to_json` writes it."""
    return {
        "step": number,
        "stage": stage,
        "branch": "cond",
        "sigma": 1 - number / 50,
        "tokens": tokens,
        "batch": 1,
        "action": action,
        "reason": "first step" if number == 0 else "",
        "seconds": 0.02,
        "blocks_run": 6 if action == "computed" else 0,
        "blocks": 6,
        "flops": 10**9,
    }


def make_results(directory: Path | None = None, rounds: int = 12) -> Results:
    """Three plain runs and two accelerated ones; with a `directory`, pictures are drawn and saved there."""
    random = np.random.default_rng(0)
    ralu = [step(n, 0 if n < 5 else 1 if n < 11 else 2, 64 if n < 5 else 121 if n < 11 else 256) for n in range(18)]
    cache = [step(n, 0, 256, "computed" if n % 3 == 0 else "reused") for n in range(50)]
    plans: dict[str, tuple[float, float, list[dict[str, Any]], Any]] = {
        "50 steps": (1.0, 0.84, [step(n, 0, 256) for n in range(50)], None),
        "28 steps": (0.57, 0.83, [step(n, 0, 256) for n in range(28)], None),
        "11 steps": (0.24, 0.76, [step(n, 0, 256) for n in range(11)], None),
        "TeaCache": (0.41, 0.82, cache, {"accelerators": [{"type": "TeaCache"}]}),
        "RALU 4x": (0.23, 0.81, ralu, {"accelerators": [{"type": "RALU"}]}),
    }
    configurations = []
    for name, (seconds, judge, steps, stack) in plans.items():
        scores = tuple((judge + 0.1 * random.standard_normal(rounds)).clip(0, 1).tolist())
        sharp = tuple((4 + random.standard_normal(rounds) * 0.2).tolist())
        images: tuple[str, ...] = ()
        if directory is not None:
            pixels = random.integers(0, 255, (len(PROMPTS), 64, 64, 3), dtype=np.uint8)
            images = save_images([Image.fromarray(picture) for picture in pixels], directory, name)
        configurations.append(
            ConfigurationResult(
                name=name,
                stack=stack,
                call={"num_inference_steps": len(steps)},
                seconds=tuple((seconds * (1 + 0.02 * random.standard_normal(rounds))).tolist()),
                flops=(sum(entry["flops"] for entry in steps if entry["action"] == "computed"),) * rounds,
                metrics={"judge": Metric(mean(scores), scores), "sharpness": Metric(mean(sharp), sharp)},
                records=({"seconds": seconds, "completed": True, "steps": steps},),
                images=images,
            )
        )
    return Results(
        title="fastdit demo",
        baseline="50 steps",
        environment=Environment("Test CPU", 2, 8.0, "Linux x86_64", "3.11", "2.13", "0.42", "0.1"),
        settings={"seed": 0, "call": {"height": 256, "width": 256}},
        images_per_round=1,
        prompts=(PROMPTS * rounds)[:rounds],
        configurations=tuple(configurations),
        created="2026-01-01T00:00:00+00:00",
    )


def with_metric(results: Results, metric: str, values: dict[str, Metric]) -> Results:
    """These results with one more metric of the named rows."""
    rows = tuple(
        dataclasses.replace(entry, metrics={**entry.metrics, metric: values[entry.name]})
        if entry.name in values
        else entry
        for entry in results.configurations
    )
    return dataclasses.replace(results, configurations=rows)
