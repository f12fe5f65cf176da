"""Gates against straight-line references on a tiny FLUX, and the schedules that policy and intervals give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_flux import Embedded, denoise, embed, head, run_blocks
from torch import Tensor

import tiny
from fastdit import (
    FORA,
    RALU,
    EasyCache,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    MagCache,
    MagnitudeCurve,
    SeaCache,
    SkipPolicy,
    TaylorSeer,
    UnsupportedModel,
    accelerate,
)
from fastdit.step import StepContext

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 14


def pattern(fast: Any) -> list[bool]:
    return [step.action == "computed" for step in fast.fastdit.last_run.steps]


@dataclass
class SeaReference:
    """acc += |s_t - s_(t-1)|_1 / |s_(t-1)|_1 with s the embedded tokens filtered by a direct (not fast) transform."""

    threshold: float
    sigmas: list[float]
    grid: tuple[int, int]
    steps: int
    previous: Tensor | None = None
    residual: Tensor | None = None
    accumulated: float = 0.0
    computed: list[bool] = field(default_factory=list)

    def filtered(self, tokens: Tensor, sigma: float) -> Tensor:
        rows, columns = self.grid
        sigma = min(sigma, 1 - 1e-6)
        frame = tokens.double().reshape(len(tokens), rows, columns, -1)

        def gains(count: int) -> Tensor:
            values = []
            for k in range(count):
                frequency = min(k, count - k) / count
                clean = 1.0 / (frequency**2 + 1e-16)
                values.append((1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2))
            return torch.tensor(values, dtype=torch.float64)

        gain = gains(rows)[:, None] * gains(columns)[None, :]
        gain = gain / gain.mean()

        def matrix(count: int) -> Tensor:
            place = torch.arange(count, dtype=torch.float64)
            return torch.exp(-2j * math.pi * place[:, None] * place[None, :] / count)

        forward = torch.einsum("fr,brcd->bfcd", matrix(rows), frame.to(torch.complex128))
        forward = torch.einsum("gc,bfcd->bfgd", matrix(columns), forward) * gain[None, :, :, None]
        back = torch.einsum("rf,bfgd->brgd", matrix(rows).conj() / rows, forward)
        return torch.einsum("cg,brgd->brcd", matrix(columns).conj() / columns, back).real

    def __call__(self, model: Any, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        signal = self.filtered(at.image, self.sigmas[step])
        if self.previous is not None:
            self.accumulated += float((signal - self.previous).abs().mean() / self.previous.abs().mean())
        self.previous = signal
        decided_on = self.accumulated
        if step in (0, self.steps - 1) or self.accumulated >= self.threshold:
            image = run_blocks(model, at, at.image, at.text, 0)[-1]
            self.residual, self.accumulated = image - at.image, 0.0
            return image, True, decided_on
        assert self.residual is not None
        return at.image + self.residual, False, decided_on


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.2])
def test_seacache_equals_its_reference(threshold: float) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2, size=(64, 96))
    fast = accelerate(pipe, [SeaCache(threshold, policy=SkipPolicy())])
    found = tiny.run(fast, call, output_type="latent")
    sigmas = [step.sigma for step in fast.fastdit.last_run.steps]
    reference = SeaReference(threshold, sigmas, (4, 6), STEPS)
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference])
    assert pattern(fast) == expected.computed["cond"]
    assert not all(pattern(fast))
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def easycache_reference(pipe: Any, call: dict[str, Any], threshold: float, first: int) -> tuple[Tensor, list[bool]]:
    """The whole loop of a FLUX pipeline with EasyCache written out."""
    import numpy as np

    model, steps = pipe.transformer, call["num_inference_steps"]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    latents, ids = pipe.prepare_latents(
        1, model.config.in_channels // 4, call["height"], call["width"], torch.float32, torch.device("cpu"),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    mu = 0.5 + (latents.shape[1] - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)
    before_in = before_out = offset = None
    rate, total, computed = None, 0.0, []
    for step, t in enumerate(scheduler.timesteps):
        compute = step < first or step == steps - 1 or rate is None
        if not compute:
            moved = float((latents - before_in).abs().mean())
            total += rate * moved / float(before_out.abs().mean())
            compute = total >= threshold
        if compute:
            text_ids = torch.zeros(call["prompt_embeds"].shape[1], 3)
            at = embed(
                model, latents, t.expand(1) / 1000, torch.full([1], 3.5), call["pooled_prompt_embeds"],
                call["prompt_embeds"], text_ids, ids,
            )  # fmt: skip
            out = head(model, at, run_blocks(model, at, at.image, at.text, 0)[-1])
            if before_out is not None:
                rate = float((out - before_out).abs().mean()) / float((latents - before_in).abs().mean())
            offset, total = out - latents, 0.0
        else:
            out = latents + offset
        computed.append(compute)
        before_in, before_out = latents, out
        latents = scheduler.step(out, t, latents, return_dict=False)[0]
    return latents, computed


@pytest.mark.parametrize(("threshold", "first"), [(0.5, 2), (0.7, 3), (1.0, 2)])
def test_easycache_equals_its_reference(threshold: float, first: int) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [EasyCache(threshold, policy=SkipPolicy(first=first))])
    found = tiny.run(fast, call, output_type="latent")
    latents, computed = easycache_reference(pipe, call, threshold, first)
    assert pattern(fast) == computed
    assert not all(computed)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)


def test_a_skipped_forward_of_easycache_runs_nothing_at_all() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [EasyCache(1.0)])
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert counts == [record.computed] * 5
    skipped = [step for step in record.steps if step.action == "reused"]
    assert skipped and all(step.flops == 0 and step.blocks_run == 0 for step in skipped)


def test_easycache_needs_no_block_lists() -> None:
    class Plain(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (hidden_states * 0.5,)

    twin = accelerate(Plain(), [EasyCache(10.0)])
    with twin.fastdit.run(num_inference_steps=6):
        for step in range(6):
            (output,) = twin(torch.full((1, 2, 3), 1.0 + 0.1 * step))
            assert output.shape == (1, 2, 3)
    assert twin.fastdit.last_run.skipped == 3


def test_a_forward_whose_output_has_another_shape_is_refused_by_easycache() -> None:
    class Wider(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (torch.cat([hidden_states, hidden_states], dim=-1),)

    twin = accelerate(Wider(), [EasyCache(10.0)])
    with pytest.raises(UnsupportedModel, match="shape"), twin.fastdit.run(num_inference_steps=6):
        twin(torch.ones(1, 2, 3))


def magcache_schedule(ratios: tuple[float, ...], threshold: float, most: int, retention: float) -> list[bool]:
    """The published loop over a recorded curve, one branch."""
    steps = len(ratios)
    computed, a, n, e = [], 1.0, 0, 0.0
    for step in range(steps):
        skip = False
        if step >= int(retention * steps + 0.5):
            a *= ratios[step]
            n += 1
            e += abs(1 - a)
            if e <= threshold and n <= most:
                skip = True
            else:
                a, n, e = 1.0, 0, 0.0
        computed.append(not skip)
    return computed


@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.24, 5, 0.1), (0.05, 4, 0.2), (0.12, 2, 0.2)])
def test_magcache_gives_the_published_schedule_on_its_published_curve(
    threshold: float, most: int, retention: float
) -> None:
    curve = MagnitudeCurve.named("flux-dev")
    steps = len(curve.ratios)
    pipe, call = tiny.flux(steps=steps)
    policy = SkipPolicy(first=1, last=0, max_consecutive=most, window=(retention, 1.0))
    fast = accelerate(pipe, [MagCache(threshold, curve, policy=policy)])
    tiny.run(fast, call)
    assert pattern(fast) == magcache_schedule(curve.ratios, threshold, most, retention)
    assert not all(pattern(fast))


def test_magcache_takes_its_second_curve_in_the_second_branch() -> None:
    still, wild = (1.0,) * STEPS, (1.0, *(0.5,) * (STEPS - 1))
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [MagCache(0.2, MagnitudeCurve(still, wild))])
    tiny.run(fast, tiny.flux_negative(call))
    steps = fast.fastdit.last_run.steps
    first, second = (
        [step.action for step in steps if step.branch == name] for name in dict.fromkeys(step.branch for step in steps)
    )
    assert "reused" in first and set(second) == {"computed"}


def test_a_curve_that_belongs_to_the_pipeline_s_timesteps_is_refused_beside_a_schedule() -> None:
    pipe, _ = tiny.flux()
    with pytest.raises(IncompatibleStack, match="timesteps"):
        accelerate(pipe, [RALU("4x"), MagCache(0.2, MagnitudeCurve((1.0, 0.9)))])


def test_a_model_without_a_curve_is_refused_and_told_what_to_do() -> None:
    pipe, _ = tiny.flux()
    with pytest.raises(InvalidConfig, match="curve"):
        accelerate(pipe, [MagCache()])


def test_seacache_is_refused_where_the_tokens_grid_is_unknown() -> None:
    pipe, _ = tiny.wan()
    with pytest.raises(UnsupportedModel):
        accelerate(pipe, [SeaCache()])


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_taylorseer_computes_its_first_steps_and_then_every_nth(interval: int) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TaylorSeer(interval, 1)])
    tiny.run(fast, call)
    assert pattern(fast) == [step < 3 or (step - 2) % interval == 0 for step in range(STEPS)]
    assert {step.action for step in fast.fastdit.last_run.steps} == {"computed", "forecast"}


def test_fora_computes_every_nth_step() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [FORA(4)])
    tiny.run(fast, call)
    assert pattern(fast) == [step % 4 == 0 for step in range(STEPS)]


@given(
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    window=st.tuples(st.floats(0, 0.45), st.floats(0.55, 1)),
    most=st.none() | st.integers(1, 3),
    steps=st.integers(2, 20),
)
def test_the_count_of_skippable_steps_is_that_of_the_steps_that_nothing_forces(
    first: int, last: int, window: tuple[float, float], most: int | None, steps: int
) -> None:
    policy = SkipPolicy(first=first, last=last, window=window, max_skipped=most)
    free = [
        step
        for step in range(1, steps)
        if policy.forced(StepContext(step, steps, 0, step, "main"), consecutive=0, skipped=0) is None
    ]
    assert policy.skippable(steps) == (len(free) if most is None else min(len(free), most))


def test_limits_of_the_policy_force_steps_by_name() -> None:
    policy = SkipPolicy(max_consecutive=2, max_skipped=4, window=(0.2, 0.8))
    at = [StepContext(step, 10, 0, step, "main") for step in range(10)]
    assert policy.forced(at[0], 0, 0) == "first steps"
    assert policy.forced(at[1], 0, 0) == "outside the window"
    assert policy.forced(at[5], 0, 0) is None
    assert policy.forced(at[5], 2, 2) == "most skips in a row"
    assert policy.forced(at[5], 0, 4) == "most skips in a stage"
    assert policy.forced(at[9], 0, 0) == "last steps"


@pytest.mark.parametrize("fields", [{"window": (0.5, 0.2)}, {"window": 3}, {"max_skipped": 0}, {"first": -1}], ids=str)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_written(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        SkipPolicy(**fields)


@pytest.mark.parametrize("interval", [0, 1.5, True])
def test_an_interval_that_is_no_count_is_refused(interval: Any) -> None:
    with pytest.raises(InvalidConfig):
        Interval(interval)
