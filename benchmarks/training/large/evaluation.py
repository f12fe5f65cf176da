"""What the large model can do by the judge for tables and by its renderer's truth, and how it falls with fewer steps.

A step count that is no worse than a larger one by every measure would say that nothing can be compared on this model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, fromarray

from common import judge_for_tables
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import Interval, mean, mean_difference
from fastdit.mini import load_mini
from fastdit.mini.language import Judge
from fastdit.mini.large.scenes import Scene, held_out, parse
from frechet import frechet_distance, jackknife
from training.large.render import rendered_prompts
from truth import truth

STEPS = (50, 20, 10, 5)
FILE = Path(__file__).parent / "evaluation.json"
_BATCH = 4
_FITTED = 60

Array = npt.NDArray[np.float64]


def evaluate(
    prompts: int, *, steps: Sequence[int] = STEPS, sides: Sequence[int] = (512, 256), out: Path = FILE
) -> None:
    """Judge pictures of held-out prompts, all of which name a ground, at every size and step count; write the file.

    Differences between step counts are paired by prompt and noise; positive is worse with fewer steps.
    """
    pipeline = load_mini("flux-512", torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    judge = judge_for_tables("flux-512")
    words = held_out(prompts, background=True)
    report: dict[str, Any] = {"environment": Environment.capture(), "prompts": prompts, "sides": {}}
    for side in sides:
        real = [fromarray(pixels) for pixels in rendered_prompts(words, 99, side)]
        target = judge.features(real).double().numpy()
        found: dict[str, Any] = {"renders": _scores(judge, real, words), "steps": {}, "falls": {}}
        _print(f"{side} px, renders", found["renders"])
        kept: dict[int, dict[str, Any]] = {}
        for count in steps if side == max(sides) else steps[:1]:
            images, curvature = generate(pipeline, words, count, side)
            features = judge.features(images).double().numpy()
            measured = truth(images, words, _FITTED)
            kept[count] = {
                "soft": judge.score(images, words).tolist(),
                "intact": judge.parts(images, words)["intact"].tolist(),
                "features": features,
            }
            found["steps"][str(count)] = {
                **_scores(judge, images, words),
                **{name: mean(values) for name, values in measured.items()},
                "curvature": mean(curvature),
                "frechet": jackknife(partial(_distance, features, target), prompts),
            }
            _print(f"{side} px, {count} steps", found["steps"][str(count)])
        for more, fewer in pairwise(kept):
            found["falls"][f"{more} to {fewer}"] = _fall(kept[more], kept[fewer], target)
            _print(f"{side} px, {more} to {fewer}", found["falls"][f"{more} to {fewer}"])
        report["sides"][str(side)] = found
    out.write_text(json.dumps(report, indent=1, default=vars) + "\n", encoding="utf-8")


def generate(pipeline: Any, words: Sequence[str], steps: int, side: int) -> tuple[list[Image], list[float]]:
    """Make pictures, each with noise of its own, and tell how curved their trajectories are.

    The curvature of one is the length of its path over the distance between its ends, less 1; both in latents.
    """
    images: list[Image] = []
    curvature: list[float] = []
    for start in range(0, len(words), _BATCH):
        chosen = list(words[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chosen))]
        path: list[torch.Tensor] = []

        def follow(
            _: Any, __: int, ___: Any, values: dict[str, Any], path: list[torch.Tensor] = path
        ) -> dict[str, Any]:
            path.append(values["latents"].float())
            return values

        call = {"height": side, "width": side, "num_inference_steps": steps, "generator": generators}
        images += pipeline(chosen, callback_on_step_end=follow, **call).images
        if len(path) > 1:
            moves = torch.stack([(after - before).flatten(1).norm(dim=1) for before, after in pairwise(path)])
            curvature += (moves.sum(dim=0) / (path[-1] - path[0]).flatten(1).norm(dim=1) - 1).tolist()
    return images, curvature


def _scores(judge: Judge, images: list[Image], words: list[str]) -> dict[str, Interval]:
    parts = judge.parts(images, words)
    scenes = [parse(prompt) for prompt in words]
    kinds = {"single_objects": _is_single, "several": _is_several, "pairs": _is_pair}
    right = {name: torch.tensor([of_kind(scene) for scene in scenes]) for name, of_kind in kinds.items()}
    return {
        "soft": mean(judge.score(images, words).tolist()),
        **{name: mean(parts["objects_right"][rows].tolist()) for name, rows in right.items()},
        "grounds": mean(parts["background_right"].tolist()),
        "intact": mean(parts["intact"].tolist()),
    }


def _is_pair(scene: Scene) -> bool:
    return scene.relation is not None


def _is_several(scene: Scene) -> bool:
    return scene.count > 1


def _is_single(scene: Scene) -> bool:
    return not _is_pair(scene) and not _is_several(scene)


def _fall(more: dict[str, Any], fewer: dict[str, Any], target: Array) -> dict[str, Interval]:
    def rise(rows: npt.NDArray[np.intp]) -> float:
        return _distance(fewer["features"], target, rows) - _distance(more["features"], target, rows)

    return {
        "soft": mean_difference(more["soft"], fewer["soft"]),
        "intact": mean_difference(more["intact"], fewer["intact"]),
        "frechet": jackknife(rise, len(target)),
    }


def _distance(features: Array, target: Array, rows: npt.NDArray[np.intp]) -> float:
    return frechet_distance(features[rows], target[rows], regularisation=1e-3)


def _print(name: str, scores: dict[str, Interval]) -> None:
    print(name, {part: str(value) for part, value in scores.items()}, flush=True)
