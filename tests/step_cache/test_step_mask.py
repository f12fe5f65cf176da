"""Step masks are obeyed, and the forecasters extrapolate what they claim to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_flux import denoise
from reference_step_mask import StepMaskReference
from torch import Tensor, nn

import tiny
from fastdit import (
    InvalidConfig,
    Reuse,
    SkipPolicy,
    StepMask,
    Taylor,
    accelerate,
)

pytestmark = pytest.mark.usefixtures("no_grad")

MASK = (1, 1, 0, 1, 1, 0, 0, 1, 0, 1)
FREE = SkipPolicy(first=1, last=0)


class Polynomial(nn.Module):
    """A transformer in the smallest sense: each block adds a polynomial of the step to the stream.

    The stack's residual at step t is sum_i c_i t^i, whatever the stream is.
    """

    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Term(value, power) for power, value in enumerate(coefficients))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


class _Term(nn.Module):
    def __init__(self, value: float, power: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.power = power

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states + self.value * timestep**self.power


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, ...]:
    return (1, *draw(st.lists(st.integers(0, 1), min_size=4, max_size=14)))


@pytest.mark.parametrize("order", [1, 2])
@given(mask=masks(), coefficients=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_taylor_is_exact_for_polynomials_up_to_its_order_at_uneven_gaps(
    order: int, mask: tuple[int, ...], coefficients: list[float]
) -> None:
    model = Polynomial([*coefficients[: order + 1], 0.0])
    twin = accelerate(model, [StepMask(mask, forecast=Taylor(order=order), policy=FREE)])
    with torch.no_grad(), never_fired_allowed(), twin.fastdit.run(num_inference_steps=len(mask)):
        for step, compute in enumerate(mask):
            stream = torch.full((1, 3, 2), float(step + 1), dtype=torch.float64)
            found = twin(stream, torch.tensor(float(step), dtype=torch.float64))
            if compute or sum(mask[:step]) > order:
                exact = stream + sum(c * step**i for i, c in enumerate(coefficients[: order + 1]))
                torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@given(mask=masks())
def test_reuse_repeats_the_last_computed_residual(mask: tuple[int, ...]) -> None:
    model = Polynomial([0.5, 1.0, 0.25])
    twin = accelerate(model, [StepMask(mask, forecast=Reuse(), policy=FREE)])
    last = 0
    with torch.no_grad(), never_fired_allowed(), twin.fastdit.run(num_inference_steps=len(mask)):
        for step, compute in enumerate(mask):
            last = step if compute else last
            stream = torch.full((1, 3, 2), float(step + 1), dtype=torch.float64)
            found = twin(stream, torch.tensor(float(step), dtype=torch.float64))
            residual = 0.5 + 1.0 * last + 0.25 * last**2
            torch.testing.assert_close(found, stream + residual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("forecast", "order"), [(Reuse(), 0), (Taylor(order=1), 1), (Taylor(order=2), 2)], ids=str)
def test_a_masked_flux_equals_the_straight_line_reference(forecast: Any, order: int) -> None:
    pipe, call = tiny.flux(steps=len(MASK), batch=2)
    call = tiny.flux_negative(call)
    fast = accelerate(pipe, [StepMask(MASK, forecast=forecast)])
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        found = tiny.run(fast, call, output_type="latent")
    states = [StepMaskReference(MASK, order) for _ in range(2)]
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), states)
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)
    assert counts == [2 * sum(MASK)] * 5


def test_the_mask_is_obeyed_to_the_letter() -> None:
    pipe, call = tiny.flux(steps=len(MASK))
    fast = accelerate(pipe, [StepMask(MASK)])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert [step.action for step in record.steps] == ["computed" if run else "reused" for run in MASK]
    assert (record.computed, record.skipped) == (sum(MASK), len(MASK) - sum(MASK))


def test_the_first_step_is_computed_whatever_the_mask_says() -> None:
    pipe, call = tiny.flux(steps=4)
    fast = accelerate(pipe, [StepMask((0, 0, 1, 0))])
    tiny.run(fast, call)
    assert [step.action for step in fast.fastdit.last_run.steps] == ["computed", "reused", "computed", "reused"]


def test_a_mask_of_ones_is_bit_equal_to_the_plain_pipeline() -> None:
    pipe, call = tiny.flux(steps=4)
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, [StepMask((1, 1, 1, 1))]), call), plain)


@pytest.mark.parametrize("steps", [3, 5])
def test_a_mask_of_another_length_than_the_run_is_refused(steps: int) -> None:
    pipe, call = tiny.flux(steps=4)
    fast = accelerate(pipe, [StepMask((1, 0, 1, 0))])
    with pytest.raises(InvalidConfig, match="4"):
        tiny.run(fast, call, num_inference_steps=steps)
    assert torch.isfinite(tiny.run(fast, call)).all()


@pytest.mark.parametrize("mask", [(), (1, 2), "101", (1.5,), None], ids=str)
def test_something_that_is_no_mask_is_refused_when_it_is_written(mask: Any) -> None:
    with pytest.raises(InvalidConfig):
        StepMask(mask)


@pytest.mark.parametrize("order", [-1, 1.5, "x"])
def test_an_order_that_makes_no_sense_is_refused_when_it_is_written(order: Any) -> None:
    with pytest.raises(InvalidConfig):
        Taylor(order=order)


@contextmanager
def never_fired_allowed() -> Iterator[None]:
    """A random mask may ask for no skip at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_bare_module_s_run_of_another_length_than_the_mask_is_refused_at_its_first_forward() -> None:
    twin = accelerate(Polynomial([1.0]), [StepMask(MASK)])
    with pytest.raises(InvalidConfig, match="10 entries and the run has 4"), twin.fastdit.run(num_inference_steps=4):
        twin(torch.zeros(1, 3, 4), 0)
