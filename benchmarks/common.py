"""What the scripts share: comparing configurations on the embedded pipeline."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray

from fastdit.measure.environment import Environment
from fastdit.measure.experiment import Configuration, Experiment
from fastdit.measure.results import Metric, Results
from fastdit.measure.statistics import mean
from fastdit.measure.timing import time_interleaved
from fastdit.mini import Architecture, load_mini
from fastdit.mini.language import Judge, judge_of, language_of
from fastdit.mini.prompts import held_out, parse
from frechet import frechet_distance, influences, interval_of
from grounds import residues
from measurements import with_seconds

#: Renders that pictures are compared with by their Frechet distance.
RENDERED = 400
#: Pictures of each row whose grounds are fitted.
FITTED = 100


def keep_freed_memory() -> None:
    """Have glibc, where that is the allocator, keep what is freed for the rest of the process.

    By default it may give freed memory back and fetch it again page by page at every step, in some processes and not in
    others, by the order of their allocations. That is up to a tenth of a step, and not what is compared.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold, most = -1, -3, 32 * 2**20
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, most)


def compare(
    configurations: Sequence[Configuration],
    *,
    title: str,
    prompts: int,
    batch: int,
    seed: int,
    first: int = 0,
    each: int = 1,
    mini: Architecture = "flux",
    dtype: torch.dtype | None = None,
) -> Results:
    """Make every configuration's pictures of held-out prompts in turns; time them, score them.

    The first configuration is the baseline; the Frechet distance is to renders of what held-out prompts ask for.
    `first` leaves out that many held-out prompts at the start, for a comparison on fresh ones. A prompt has `each`
    pictures, whose scores are averaged, and which are left out of the distance together.
    """
    judge, pipeline = judge_for_tables(mini), pipeline_of(mini, dtype)
    asked = language_of(mini).held_out(first + prompts, seed, background=True)[first:]
    made = []
    for number in range(each):
        # A pass at a time, so that no more than one picture of each prompt is kept.
        start = seed + first + number * prompts
        experiment = Experiment(pipeline, asked, seed=start, batch=batch, judge=judge, progress=_say)
        results, images = experiment.run(configurations, title=title, baseline=configurations[0].name)
        results = with_truth(results, images, mini)
        made.append(Pass(results, {name: judge.features(pictures).numpy() for name, pictures in images.items()}))
    return joined(made, judge.features(renders(RENDERED, seed + 1, mini)).numpy())


def with_truth(results: Results, images: Mapping[str, Sequence[Image]], mini: Architecture) -> Results:
    """Add what is wrong with pictures by what their renderer knows, which no search has seen."""
    rows = []
    for entry in results.configurations:
        if mini == "flux-512":
            from truth import truth

            measured = truth(images[entry.name], results.prompts, FITTED)
        else:
            measured = {"residue": residues(images[entry.name])}
        own = {name: Metric(mean(samples), tuple(samples)) for name, samples in measured.items()}
        rows.append(dataclasses.replace(entry, metrics={**entry.metrics, **own}))
    return dataclasses.replace(results, configurations=tuple(rows))


@dataclasses.dataclass(frozen=True)
class Pass:
    """One picture of every prompt by every configuration: its results, and the judge's features by name."""

    results: Results
    features: Mapping[str, np.ndarray]


def joined(passes: Sequence[Pass], target: np.ndarray) -> Results:
    """Join passes over the same prompts, with the Frechet distance of all pictures to the features `target`.

    The scores of a prompt's pictures, which are no samples of their own, are averaged. The records of single runs are
    left out: they are for a reader of one report, and megabytes in a comparison of many.
    """
    results = [one.results for one in passes]
    prompts = len(results[0].prompts)
    rows = []
    for entry in results[0].configurations:
        same = [one[entry.name] for one in results]
        samples = {name: np.mean([one.metrics[name].samples for one in same], axis=0) for name in entry.metrics}
        metrics = {name: Metric(mean(list(values)), tuple(values.tolist())) for name, values in samples.items()}
        features = [one.features[entry.name] for one in passes]

        def distance(chosen: np.ndarray, features: list[np.ndarray] = features) -> float:
            return frechet_distance(target, np.concatenate([one[chosen] for one in features]), regularisation=1e-3)

        moved = influences(distance, prompts)
        metrics["frechet"] = Metric(interval_of(moved), moved)
        seconds = tuple(value for one in same for value in one.seconds)
        flops = tuple(value for one in same for value in one.flops)
        rows.append(dataclasses.replace(entry, metrics=metrics, seconds=seconds, flops=flops, records=()))
    return dataclasses.replace(
        results[0], prompts=tuple(prompt for one in results for prompt in one.prompts), configurations=tuple(rows)
    )


def clock(
    configurations: Sequence[Configuration],
    results: Results,
    *,
    rounds: int,
    mini: Architecture = "flux",
    dtype: torch.dtype | None = None,
) -> Results:
    """Time what `compare` compared anew, in so many rounds of its prompts: for a machine that is quiet for minutes."""
    experiment = Experiment(pipeline_of(mini, dtype), results.prompts, batch=results.images_per_round)
    tasks = {entry.name: experiment.task(entry) for entry in configurations}
    timed = time_interleaved(tasks, rounds=rounds, progress=lambda done, total: _say("timing", done, total))
    return dataclasses.replace(with_seconds(results, timed), environment=Environment.capture())


def judge_for_tables(mini: Architecture) -> Judge:
    """Load the judge that tables are made with. Ends where there is none."""
    judge = judge_of(mini, "tables")
    if judge is None:
        raise SystemExit(f"{mini} has no judge yet: train it by the recipe in benchmarks/training")
    return judge


def pipeline_of(mini: Architecture, dtype: torch.dtype | None = None) -> Any:
    """Load an embedded pipeline without its progress bar."""
    pipeline = load_mini(mini, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def renders(count: int, seed: int, mini: Architecture = "flux") -> list[Image]:
    """Draw what `count` held-out prompts ask for, as the training pictures were drawn; needs the extra `train`."""
    if mini == "flux-512":
        from training.large.render import rendered_prompts

        asked = language_of(mini).held_out(count, seed, background=True)
        return [fromarray(pixels) for pixels in rendered_prompts(asked, seed, 512)]
    from training.small.render import draw, random_picture

    random = np.random.default_rng(seed)
    drawn = (draw(random_picture(parse(prompt), random), 256) for prompt in held_out(count, seed, background=True))
    return [fromarray((pixels * 255.0).astype(np.uint8)) for pixels in drawn]


def _say(phase: str, done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        print(f"{phase}: {done} of {total}", flush=True)
