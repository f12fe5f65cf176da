"""Quality at equal time on the embedded pipeline: fewer plain steps, caches, RALU, and stacks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from fastdit.caching.first_block_cache import FirstBlockCache
from fastdit.caching.teacache import TeaCache
from fastdit.measure.experiment import Configuration, Experiment, plain
from fastdit.measure.images import frechet_distance
from fastdit.measure.results import Metric
from fastdit.measure.statistics import jackknife
from fastdit.measure.table import rich_table
from fastdit.mini import load_mini
from fastdit.mini.judge import load_judge
from fastdit.mini.prompts import held_out
from fastdit.spatial.ralu import RALU
from fastdit.stack import Stack


def configurations() -> list[Configuration]:
    """The plain runs that every method must beat, and the methods."""
    stacks = {
        "TeaCache .2": [TeaCache(0.2)],
        "TeaCache .4": [TeaCache(0.4)],
        "FirstBlockCache .1": [FirstBlockCache(0.1)],
        "RALU 4x": [RALU("4x")],
        "RALU 4x, paper": [RALU("4x", fidelity="paper")],
        "RALU 5x": [RALU("5x")],
        "RALU 7x": [RALU("7x")],
        "RALU 4x + TeaCache .2": [RALU("4x"), TeaCache(0.2)],
        "RALU 7x + TeaCache .2": [RALU("7x"), TeaCache(0.2)],
    }
    methods = [
        Configuration(name, Stack(stack), {} if Stack(stack).schedule is not None else {"num_inference_steps": 50})
        for name, stack in stacks.items()
    ]
    return [*map(plain, (50, 28, 15, 12, 10, 8, 7, 6, 5)), *methods]


def main(
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 200,
    batch: int = 8,
    seed: int = 0,
    out: Path = Path("benchmarks/results/quality.json"),
) -> None:
    """Generate, time, score; the Frechet distance is to the plain run of 50 steps on other seeds."""
    pipeline = load_mini()
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge()
    experiment = Experiment(
        pipeline, held_out(prompts, seed, background=True), seed=seed, batch=batch, judge=judge, progress=_say
    )
    results, images = experiment.run(configurations(), title="quality at equal time", baseline="50 steps")
    reference = [
        image
        for start in range(0, prompts, batch)
        for image in pipeline(
            list(experiment.prompts[start : start + batch]), generator=torch.Generator().manual_seed(10_000 + start)
        ).images
    ]
    target = judge.features(reference).numpy()
    distances = {}
    for name, made in images.items():
        features = judge.features(made).numpy()

        def distance(rows: np.ndarray, features: np.ndarray = features) -> float:
            return frechet_distance(target, features[rows], regularisation=1e-3)

        distances[name] = Metric(jackknife(distance, prompts))
    results = results.with_metric("frechet", distances)
    Console().print(rich_table(results))
    results.save(out)


def _say(phase: str, done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        print(f"{phase}: {done} of {total}", flush=True)


if __name__ == "__main__":
    np.seterr(all="raise")
    typer.run(main)
