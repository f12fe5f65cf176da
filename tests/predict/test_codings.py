"""What schedules say that they ask of the autoencoder is what they ask, a third party's lift and selector too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

import tiny
from fastdit import RALU, BottleneckSampling, Edges, JustInTime, PixelLift, ProgressiveResolution, accelerate
from fastdit.bench.cost import CostMeter
from fastdit.models.autoencoders import Coding
from fastdit.predict.curve import Curve
from fastdit.predict.estimate import predict
from fastdit.schedule.lifts.base import CleanLift, Switch
from fastdit.schedule.selectors.base import Scene, Selector

PIXELS = 16  # along a token's side


@dataclass(frozen=True)
class Encoded(CleanLift):
    """A third party's lift, which encodes a grey picture and decodes nothing."""

    codes: ClassVar = (Coding.ENCODE,)

    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        height, width = (side * PIXELS for side in frames.shape[2:])
        return switch.family.encode(switch.pipeline, frames.new_zeros(len(frames), 3, height, width))


@dataclass(frozen=True)
class Brightest(Selector):
    """A third party's selector, which looks at the decoded picture."""

    codes: ClassVar = (Coding.DECODE,)

    def scores(self, scene: Scene) -> torch.Tensor:
        shades = scene.decoded().float().mean(dim=1, keepdim=True)
        return torch.nn.functional.adaptive_avg_pool2d(shades, (scene.rows, scene.columns)).flatten(1)


MIXED: dict[str, Any] = {"steps": (3, 2, 2), "ends": (0.3, 0.6), "ratio": 0.3}

SCHEDULES: dict[str, Any] = {
    "a copy of tokens, edges": RALU(**MIXED),
    "pixels, edges": RALU(**MIXED, starts=(0.2, 0.4), lift=PixelLift()),
    "a third party's lift and selector": RALU(**MIXED, starts=(0.2, 0.4), lift=Encoded(), selector=Brightest()),
    "whole frames by a third party's lift": ProgressiveResolution(
        steps=(3, 2), ends=(0.6,), starts=(0.2,), lift=Encoded()
    ),
    "down and up again": BottleneckSampling((1, 2, 2), lift=PixelLift()),
    "anchors by edges": JustInTime((2, 2, 2), selector=Edges()),
    "anchors by a third party's selector": JustInTime((2, 2, 2), selector=Brightest()),
    "anchors by latents": JustInTime((2, 2, 2)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_run_codes_what_its_schedule_says(schedule: Any) -> None:
    pipeline, call = tiny.flux(size=128, steps=6)
    seen: list[tuple[Coding, int]] = []

    def decoded(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append((Coding.DECODE, given[0].shape[2] * given[0].shape[3] // 4))

    def encoded(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append((Coding.ENCODE, given[0].shape[2] * given[0].shape[3] // PIXELS**2))

    pipeline.vae.decoder.register_forward_pre_hook(decoded)
    pipeline.vae.encoder.register_forward_pre_hook(encoded)
    fast = accelerate(pipeline, [schedule])
    given = {name: value for name, value in call.items() if name != "num_inference_steps"}
    fast(**{**given, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))
    plan = fast.fastdit.plan(128, 128)
    (own,) = fast.fastdit.stack
    said = [one for pair in pairwise(plan.stages) for one in own.codings(*pair, 64)]
    assert sorted(seen, key=str) == sorted(said, key=str)


def test_the_estimate_counts_a_third_partys_pictures() -> None:
    pipeline, call = tiny.flux(size=128, steps=6)
    given = {name: value for name, value in call.items() if name not in ("num_inference_steps", "generator")}
    measured = CostMeter(pipeline, given).rounds(1)
    model = replace(measured, decode=Curve(linear=1.0), encode=Curve(linear=100.0))
    switches = {}
    for name in ("a copy of tokens, edges", "a third party's lift and selector"):
        plan = accelerate(pipeline, [SCHEDULES[name]]).fastdit.plan(128, 128)
        costs = [predict(one, pipeline, plan) for one in (model, replace(model, decode=Curve(), encode=Curve()))]
        switches[name] = costs[0].seconds.value - costs[1].seconds.value
    final, preview, encodings = 64.0, 16.0, 2 * 6400.0
    assert switches["a copy of tokens, edges"] == pytest.approx(final + preview)
    assert switches["a third party's lift and selector"] == pytest.approx(final + preview + encodings)
