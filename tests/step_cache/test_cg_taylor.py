"""The confidence gate against a straight-line reference, which predicts by a line through two points of a list."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from diffusers import FluxTransformer2DModel
from reference_flux import Embedded, denoise, first_block, run_blocks
from torch import Tensor

import tiny
from fastdit import CGTaylor, SkipPolicy, accelerate

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 14


@dataclass
class Reference:
    """The computed steps of one branch: (step, what the first block added, what the others added)."""

    threshold: float
    points: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def on_the_line(self, step: int, which: int) -> Tensor:
        if len(self.points) == 1:
            return self.points[0][which]
        (t0, *early), (t1, *late) = self.points[-2:]
        share = (step - t0) / (t1 - t0)
        return (1 - share) * early[which - 1] + share * late[which - 1]

    def __call__(self, model: FluxTransformer2DModel, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        text, image = first_block(model, at)
        error = float("inf")
        if self.points:
            predicted = self.on_the_line(step, 1)
            error = float((image - at.image - predicted).abs().mean() / predicted.abs().mean())
        if 2 <= step < STEPS - 1 and error < self.threshold:
            return image + self.on_the_line(step, 2), False, error
        after = run_blocks(model, at, image, text, 1)[-1]
        self.points.append((step, image - at.image, after - image))
        return after, True, error


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.1, 1.5])
def test_latents_and_skip_schedule_equal_the_reference(threshold: float) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2, size=(64, 96))
    fast = accelerate(pipe, [CGTaylor(threshold)])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [Reference(threshold)])
    computed = [step.action == "computed" for step in fast.fastdit.last_run.steps]
    assert computed == expected.computed["cond"]
    assert not all(computed)
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def test_a_signal_on_a_line_is_predicted_whatever_the_gaps_and_one_that_bends_is_not() -> None:
    gate, start = CGTaylor(0.1, policy=SkipPolicy(first=1)), torch.randn(1, 4, 8)
    memory = gate.memory()
    for step, computed in enumerate([True, False, True, False, False, True, False]):
        signal = start + 0.5 * step
        change = gate.change(memory, signal)
        if step > 2:
            assert change is not None and float(change[0]) < 1e-6
        gate.remember(memory, signal, computed)
    bent = gate.change(memory, start - 5.0)
    assert bent is not None and float(bent[0]) > 1.0
