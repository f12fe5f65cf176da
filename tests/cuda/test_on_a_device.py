"""Every accelerator on a CUDA device: nothing mixes devices, and how often the host waits is a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretended import CUDA, Event, PretendedGenerator, PretendedTensor, Waits, moved, pretending

import tiny
from combinations import Straight
from fastdit import (
    DMD,
    RALU,
    Attention,
    BottleneckSampling,
    CGTaylor,
    ClusCa,
    CorrectedLift,
    DuCa,
    EasyCache,
    FirstBlockCache,
    FoCa,
    Interval,
    JustInTime,
    LatentLift,
    LatentVariance,
    MagCache,
    MagnitudeCurve,
    PixelGradient,
    PixelLift,
    ProgressiveResolution,
    SeaCache,
    SpectralLift,
    Stack,
    Taylor,
    TeaCache,
    TextAttention,
    ToCa,
    VelocityVariance,
    accelerate,
)
from fastdit.errors import FastditWarning
from fastdit.measure.timing import timed
from fastdit.record import Stopwatch

STEPS = 8
CURVE = MagnitudeCurve(tuple(1.0 - 0.01 * step for step in range(STEPS)))
SHORT: dict[str, Any] = {"steps": (2, 2, 2), "ends": (0.3, 0.45), "ratio": 0.3}

#: Stacks, with how often they may wait: for every decision of a step, and beside that in a whole run.
STACKS: dict[str, tuple[Callable[[], list[Any]], int, int]] = {
    "empty": (lambda: [], 0, 0),
    "TeaCache": (lambda: [TeaCache(0.25, (1.0, 0.0))], 1, 0),
    "TeaCache, each image": (lambda: [TeaCache(0.25, (1.0, 0.0), per_image=True)], 1, 0),
    "FirstBlockCache": (lambda: [FirstBlockCache(0.2)], 1, 0),
    "FirstBlockCache, each image": (lambda: [FirstBlockCache(0.2, per_image=True)], 1, 0),
    "FirstBlockCache, two lists": (lambda: [FirstBlockCache(0.3, scope="list")], 2, 0),  # each is a decision
    "EasyCache": (lambda: [EasyCache(0.3)], 1, 0),
    "EasyCache, each image": (lambda: [EasyCache(0.3, per_image=True)], 1, 0),
    "SeaCache": (lambda: [SeaCache(0.3)], 1, 0),
    "MagCache": (lambda: [MagCache(0.2, CURVE)], 0, 0),
    "CGTaylor": (lambda: [CGTaylor()], 1, 0),
    "Interval, Taylor": (lambda: [Interval(3, forecast=Taylor(2))], 0, 0),
    "Interval, FoCa": (lambda: [Interval(3, forecast=FoCa())], 0, 0),
    "Interval, DMD": (lambda: [Interval(3, forecast=DMD())], 0, 4),  # a fit at most of the four computed steps
    "ToCa": (lambda: [ToCa()], 0, 0),
    "ToCa, text": (lambda: [ToCa(score="text")], 0, 0),
    "DuCa": (lambda: [DuCa()], 0, 0),
    "ClusCa": (lambda: [ClusCa()], 0, 0),
    "RALU": (lambda: [RALU(**SHORT)], 0, 3),
    "RALU, paper": (lambda: [RALU(**SHORT, fidelity="paper")], 0, 3),
    "RALU, fine frame": (lambda: [RALU(**SHORT, frame="fine")], 0, 3),
    "RALU, through pixels": (lambda: [RALU(**SHORT, lift=PixelLift(noise="hadamard"))], 0, 3),
    "RALU, latents": (lambda: [RALU(**SHORT, lift=LatentLift(noise="fresh"))], 0, 3),
    "RALU, velocities": (lambda: [RALU(**SHORT, selector=VelocityVariance())], 0, 0),
    "RALU, latent variance": (lambda: [RALU(**SHORT, selector=LatentVariance())], 0, 0),
    "RALU, gradients": (lambda: [RALU(**SHORT, selector=PixelGradient())], 0, 0),
    "RALU, text attention": (lambda: [RALU(**SHORT, selector=TextAttention())], 0, 0),
    "RALU, carried": (lambda: [RALU(**SHORT), TeaCache(0.25, (1.0, 0.0), stage_change="carry")], 1, 3),
    "RALU, ToCa carried": (lambda: [RALU(**SHORT), ToCa(stage_change="carry")], 0, 3),
    "JustInTime": (lambda: [JustInTime((3, 3, 2))], 0, 2),  # where the first anchors lie
    "ProgressiveResolution": (lambda: [ProgressiveResolution(steps=(4, 4))], 0, 0),
    "ProgressiveResolution, spectral": (
        lambda: [ProgressiveResolution(steps=(4, 4), ends=(0.15,), starts=(0.08,), lift=SpectralLift())],
        0,
        2,  # the matrices that enlarge both sides
    ),
    "ProgressiveResolution, corrected": (lambda: [ProgressiveResolution(steps=(4, 4), lift=CorrectedLift())], 0, 0),
    "BottleneckSampling": (lambda: [BottleneckSampling((2, 4, 2))], 0, 0),
    "engine": (lambda: [Straight()], 0, 0),
    "attention": (lambda: [Attention("native")], 0, 0),
    "all": (lambda: [RALU(**SHORT), TeaCache(0.25, (1.0, 0.0)), Straight()], 1, 3),
}

Pretended = tuple[Any, dict[str, Any], Waits]


@pytest.fixture
def device() -> Iterator[Waits]:
    with pytest.MonkeyPatch.context() as patch, pretending(patch) as waits:
        yield waits


@pytest.fixture(params=["flux", "sd3"])
def pipeline(request: pytest.FixtureRequest, device: Waits) -> Pretended:
    pipe, call = getattr(tiny, request.param)(size=128, batch=2, steps=STEPS)
    there = {name: PretendedTensor(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    return moved(pipe), there, device


def run(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    made: torch.Tensor = pipeline(**call, generator=PretendedGenerator().manual_seed(0)).images
    return made


@pytest.mark.parametrize("name", STACKS)
def test_it_runs_on_the_device_and_waits_no_more_often_than_the_table_says(name: str, pipeline: Pretended) -> None:
    pipe, call, waits = pipeline
    make, a_step, a_run = STACKS[name]
    stack = Stack(make())
    if stack.schedule is not None:
        call = {key: value for key, value in call.items() if key != "num_inference_steps"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastditWarning)
        fast = accelerate(pipe, stack)
        run(fast, call)  # what is found out once may wait
        waits.by_line.clear()
        latents = run(fast, call | {"output_type": "latent"})
    assert latents.device == CUDA and bool(torch.isfinite(latents.held).all())
    # Before the first step the noise levels are read (a schedule's are put there), at the end the events of all steps.
    amid = {line: count for line, count in waits.ours.items() if "event at" not in line and "/run.py" not in line}
    assert sum(amid.values()) <= a_step * STEPS + a_run + (stack.schedule is not None), amid


def test_a_mix_of_devices_and_a_generator_of_the_other_are_refused(device: Waits) -> None:
    there, here = torch.zeros(2, device="cuda"), torch.zeros(2)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=PretendedGenerator().manual_seed(0))
    assert (there + 1).device == CUDA and float((there + 1).sum()) == 2.0
    assert sum(device.by_line.values()) == 1


def test_steps_are_timed_on_the_stream_of_their_own_device(device: Waits) -> None:
    second = torch.device("cuda", 1)
    Event.recorded.clear()
    watch = Stopwatch(second)
    watch.stop()
    assert Event.recorded == [("stream", second)] * 2 and watch.seconds == 0.001


def test_timing_waits_for_the_device_that_it_is_told(device: Waits) -> None:
    timed(lambda number: number, 0, "cuda:1")
    assert [what for what, _ in device.by_line] == ["synchronize cuda:1"]
    assert sum(device.by_line.values()) == 2
