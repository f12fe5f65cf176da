"""What a trained model can do: accuracy at its usual steps, and how quality falls with fewer, by the judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, fromarray

from fastdit.measure.images import sharpness
from fastdit.measure.statistics import Interval, mean, mean_difference
from fastdit.mini import Architecture, load_mini
from fastdit.mini.judge import Judge, load_judge
from fastdit.mini.prompts import held_out, parse
from frechet import frechet_distance, jackknife
from training.small.render import draw, random_picture
from training.small.stage import MINI

_BATCH = 16

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """The step counts at which a model is judged: all, those that are compared, and its usual one; and the file."""

    steps: tuple[int, ...]
    compared: tuple[int, ...]
    usual: int
    file: Path


COURSES: dict[Architecture, Course] = {
    "flux": Course((50, 28, 15, 10, 7, 5, 3), (50, 7, 5), 50, MINI / "evaluation.json"),
    "sd3": Course((50, 28, 14, 9, 7, 5), (50, 28, 14, 9, 7, 5), 28, MINI / "evaluation-sd3.json"),
}


@dataclass(frozen=True)
class _Judged:
    """What is compared between step counts: a value a picture, and features a picture."""

    soft: list[float]
    sharpness: list[float]
    features: Array


def evaluate(architecture: Architecture, prompts: int, pictures: int) -> None:
    """Judge `prompts` held-out prompts at every step count, and compare some of them over `pictures` pictures.

    Compared are the soft score, the sharpness and the Frechet distance to real renders, each as the paired difference
    of two step counts on the same prompts and noise. The model runs in bfloat16, the precision of its weights. Writes
    the architecture's JSON file beside the weights.
    """
    course = COURSES[architecture]
    pipeline = load_mini(architecture, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge()
    words = held_out(max(prompts, pictures), background=True)
    real = _real(words[:pictures])
    target = judge.features(real).double().numpy()
    report: dict[str, Any] = {"prompts": prompts, "pictures": pictures, "steps": {}, "falls": {}}
    compared: dict[int, _Judged] = {}
    sharp = 0.0
    for steps in course.steps:
        count = max(prompts, pictures) if steps in course.compared else prompts
        images = _generate(pipeline, words[:count], steps, 256)
        scores = _scores(judge, images[:prompts], words[:prompts])
        values = sharpness(images)
        sharp = sharp or float(np.mean(values))
        scores["relative_sharpness"] = mean([value / sharp for value in values])
        if steps in course.compared:
            made = _Judged(judge.score(images, words[:count]).tolist(), values, judge.features(images).double().numpy())
            compared[steps] = made
            scores["frechet"] = jackknife(partial(_distance, made.features, target), pictures)
        report["steps"][str(steps)] = scores
        _print(str(steps), scores)
    for more, fewer in pairwise(course.compared):
        name = f"{more} to {fewer}"
        report["falls"][name] = _fall(compared[more], compared[fewer], target, sharp)
        _print(name, report["falls"][name])
    half = _scores(judge, _generate(pipeline, words[:prompts], course.usual, 128), words[:prompts])
    report["half_size"] = {str(course.usual): half}
    _print("128 px", half)
    report["judge_on_renders"] = _scores(judge, real, words[:pictures])
    _print("real renders", report["judge_on_renders"])
    course.file.write_text(json.dumps(report, indent=1, default=vars) + "\n", encoding="utf-8")


def _print(name: str, scores: dict[str, Interval]) -> None:
    print(name, {part: str(value) for part, value in scores.items()}, flush=True)


def _fall(more: _Judged, fewer: _Judged, target: Array, sharp: float) -> dict[str, Interval]:
    """Give what the fewer steps lose, paired by picture: positive is worse, for every measure."""

    def rise(rows: npt.NDArray[np.intp]) -> float:
        return _distance(fewer.features, target, rows) - _distance(more.features, target, rows)

    relative = [[value / sharp for value in side.sharpness] for side in (more, fewer)]
    return {
        "soft": mean_difference(more.soft, fewer.soft),
        "relative_sharpness": mean_difference(*relative),
        "frechet": jackknife(rise, len(target)),
    }


def _distance(features: Array, target: Array, rows: npt.NDArray[np.intp]) -> float:
    return frechet_distance(features[rows], target[rows], regularisation=1e-3)


def _generate(pipeline: Any, words: list[str], steps: int, size: int) -> list[Image]:
    images: list[Image] = []
    for start in range(0, len(words), _BATCH):
        chosen = words[start : start + _BATCH]
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chosen))]
        call = {"height": size, "width": size, "num_inference_steps": steps, "generator": generators}
        images += pipeline(chosen, **call).images
    return images


def _scores(judge: Judge, images: list[Image], words: list[str]) -> dict[str, Interval]:
    """Give accuracies (single objects, pairs, background, place) and the soft score, each with its interval."""
    parts = judge.parts(images, words)
    single = torch.tensor([parse(prompt).kind == "single" for prompt in words])
    scores = {
        "soft": mean(judge.score(images, words).tolist()),
        "single_objects": mean(parts["objects_right"][single].tolist()),
        "pairs": mean(parts["objects_right"][~single].tolist()),
        "background": mean(parts["background_right"].tolist()),
        "intact": mean(parts["intact"].tolist()),
    }
    places = parts["place_right"][~parts["place_right"].isnan()]
    return {**scores, "place": mean(places.tolist())}


def _real(words: list[str]) -> list[Image]:
    random = np.random.default_rng(99)
    drawn = [draw(random_picture(parse(prompt), random), 256) for prompt in words]
    return [fromarray((pixels * 255.0).astype(np.uint8)) for pixels in drawn]
