"""What the trained model can do: accuracy at 50 steps, and how quality falls with fewer steps, by the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, fromarray

from fastdit.measure.images import frechet_distance, sharpness
from fastdit.measure.statistics import Interval, jackknife, mean
from fastdit.mini import load_mini
from fastdit.mini.judge import load_judge
from fastdit.mini.prompts import held_out, parse
from fastdit.mini.train.render import draw, random_picture

STEPS = (50, 28, 15, 10, 7, 5, 3)
FILE = Path(__file__).parents[1] / "evaluation.json"
_BATCH = 16


def evaluate(prompts: int, pictures: int) -> None:
    """Judge `prompts` held-out prompts at every step count, and the Frechet distance over `pictures` at 50, 7 and 5.

    The model runs in bfloat16, the precision of its weights. Writes evaluation.json beside the weights.
    """
    pipeline = load_mini(torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    words = held_out(max(prompts, pictures), background=True)
    real = _real(words[:pictures])
    report: dict[str, Any] = {"prompts": prompts, "pictures": pictures, "steps": {}}
    sharp = 0.0
    for steps in STEPS:
        count = max(prompts, pictures) if steps in (50, 7, 5) else prompts
        images = _generate(pipeline, words[:count], steps, 256)
        scores = _scores(images[:prompts], words[:prompts])
        values = sharpness(images)
        sharp = sharp or float(np.mean(values))
        scores["relative_sharpness"] = mean([value / sharp for value in values])
        scores["frechet"] = _frechet(images, real[:count])
        report["steps"][str(steps)] = scores
        print(steps, {name: format(value, ".3f") for name, value in scores.items()}, flush=True)
    report["half_size_50"] = _scores(_generate(pipeline, words[:prompts], 50, 128), words[:prompts])
    print("128 px", {name: format(value, ".3f") for name, value in report["half_size_50"].items()}, flush=True)
    judged = [picture.resize((128, 128)) for picture in real]
    report["judge_on_renders"] = {"256": _scores(real, words[:pictures]), "128": _scores(judged, words[:pictures])}
    print("judge on renders", {n: format(v, ".3f") for n, v in report["judge_on_renders"]["256"].items()}, flush=True)
    FILE.write_text(json.dumps(report, indent=1, default=vars) + "\n", encoding="utf-8")


def _generate(pipeline: Any, words: list[str], steps: int, size: int) -> list[Image]:
    images: list[Image] = []
    for start in range(0, len(words), _BATCH):
        chosen = words[start : start + _BATCH]
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chosen))]
        call = {"height": size, "width": size, "num_inference_steps": steps, "generator": generators}
        images += pipeline(chosen, **call).images
    return images


def _scores(images: list[Image], words: list[str]) -> dict[str, Interval]:
    """Give accuracies (single objects, pairs, background, place) and the soft score, each with its interval."""
    judge = load_judge()
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


def _frechet(images: list[Image], real: list[Image]) -> Interval:
    judge = load_judge()
    ours, theirs = judge.features(images).numpy(), judge.features(real).numpy()

    def distance(rows: npt.NDArray[np.intp]) -> float:
        return frechet_distance(ours[rows], theirs[rows], regularisation=1e-3)

    return jackknife(distance, len(ours))
