"""What a call will cost: curves, a pipeline's costs, sums over a plan, and the roofline of published machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastdit import InvalidConfig, UnsupportedModel, accelerate, testing
from fastdit.bench.cost import CostMeter, LiveBytes, probed
from fastdit.bench.grammar import parse_stack
from fastdit.cli import app
from fastdit.predict import roofline
from fastdit.predict.cost import CostModel, Probe, Steadiness, keep_model, kept_model, place_of
from fastdit.predict.curve import Curve
from fastdit.predict.estimate import predict

STEPS = 6


@pytest.fixture(scope="module")
def measured() -> tuple[Any, dict[str, Any], CostMeter, CostModel]:
    """A tiny FLUX, a call of it, and its costs by one round, whatever else ran meanwhile."""
    pipeline, call = testing.PIPELINES["FluxPipeline"](size=128, steps=STEPS, batch=1)
    call = {name: value for name, value in call.items() if name not in ("num_inference_steps", "generator")}
    meter = CostMeter(pipeline, call)
    return pipeline, call, meter, replace(meter.rounds(1), steadiness=None)


def run(pipeline: Any, call: dict[str, Any], text: str, size: int, steps: int | None) -> Any:
    twin = accelerate(pipeline, parse_stack(text))
    given = {} if steps is None else {"num_inference_steps": steps}
    twin(**{**call, "height": size, "width": size, **given}, generator=torch.Generator().manual_seed(3))
    return twin


def test_a_curve_finds_the_coefficients_of_points_that_it_can_pass_through() -> None:
    true = Curve(0.5, 0.25, 1e-3, 1e-6)
    places = [(1, 16), (1, 64), (1, 144), (1, 256), (2, 64)]
    found = Curve.fit([(rows, tokens, true.at(rows, tokens)) for rows, tokens in places])
    assert found.at(4, 1024) == pytest.approx(true.at(4, 1024), rel=0.02)


def test_a_curve_has_no_negative_part() -> None:
    found = Curve.fit([(1, 16, 1.0), (1, 64, 0.9), (1, 256, 1.1)])
    assert min(found.call, found.row, found.linear, found.quadratic) >= 0
    with pytest.raises(ValueError, match="at least one point"):
        Curve.fit([])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", STEPS),
        ("Interval 2", STEPS),
        ("StepMask (1,0,0,1,0,1)", STEPS),
        ("Interval 3 scope=forward", STEPS),
        ("ProgressiveResolution 4x", None),
    ],
)
def test_flops_are_those_of_the_run_where_nothing_is_decided_in_it(measured: Any, text: str, steps: int | None) -> None:
    pipeline, call, _, model = measured
    twin = run(pipeline, call, text, 96 if steps else 64, steps)
    plan = twin.fastdit.plan(96 if steps else 64, 96 if steps else 64, steps)
    said = predict(model, pipeline, plan).flops
    assert said.low == said.high
    assert said.value == pytest.approx(twin.fastdit.last_run.flops, rel=1e-3)


@pytest.mark.parametrize("text", ["FirstBlockCache 3", "ToCa", "EasyCache 5", "Interval 2, ToCa first=1"])
def test_a_range_holds_what_is_decided_in_the_run(measured: Any, text: str) -> None:
    pipeline, call, _, model = measured
    twin = run(pipeline, call, text, 96, STEPS)
    said = predict(model, pipeline, twin.fastdit.plan(96, 96, STEPS))
    assert (
        said.flops.low <= twin.fastdit.last_run.flops * 1.001 and twin.fastdit.last_run.flops <= said.flops.high * 1.001
    )
    assert said.flops.low < said.flops.high and any("the range holds" in note for note in said.notes)


def test_a_stack_that_was_run_small_has_a_narrow_range(measured: Any) -> None:
    pipeline, _, meter, model = measured
    stack = parse_stack("FirstBlockCache 3")
    known = probed(meter, model, stack, STEPS)
    plan = accelerate(pipeline, stack).fastdit.plan(96, 96, STEPS)
    wide, narrow = (predict(one, pipeline, plan) for one in (model, known))
    assert narrow.flops.high - narrow.flops.low < wide.flops.high - wide.flops.low
    assert not narrow.notes and CostModel.from_json(json.loads(json.dumps(known.to_json()))) == known


def test_a_probe_runs_at_half_the_size_and_at_the_whole(measured: Any) -> None:
    _, _, meter, model = measured
    ((small, large),) = probed(meter, model, parse_stack("Interval 2"), STEPS).probes.values()
    assert (small.tokens, large.tokens) == (meter.tokens(meter.sizes[1]), meter.tokens(meter.sizes[-1]))


@pytest.mark.parametrize(
    ("tokens", "share"), [(64, 0.8), (256, 0.4), (128, 0.6), (512, 0.2), (4096, 0.2), (32, 1.0), (1, 1.0)]
)
def test_what_a_stack_does_between_and_beyond_its_probes_is_linear_in_the_logarithm_as_far_as_a_factor_of_two(
    tokens: int, share: float
) -> None:
    probes = [Probe(64, (1.0, 0.8), (1.0, 1.0), 0.9, 1.0, 1.2), Probe(256, (1.0, 0.4), (1.0, 1.0), 1.0, 1.1, 1.0)]
    found = Probe.at(probes, tokens)
    assert found.shares == pytest.approx((1.0, share)) and found.outer == (1.0, 1.0)
    assert (found.low, found.high) == (0.9, 1.1)


def test_one_probe_serves_every_size() -> None:
    only = Probe(64, (1.0, 0.8), (1.0, 1.0), 0.9, 1.0, 1.2)
    assert Probe.at([only], 1000) == replace(only, tokens=1000)


def test_seconds_grow_with_images_and_memory_holds_the_weights(measured: Any) -> None:
    pipeline, _, _, model = measured
    plan = accelerate(pipeline, parse_stack("")).fastdit.plan(128, 128, STEPS)
    one, four = (predict(model, pipeline, plan, batch=batch) for batch in (1, 4))
    assert one.seconds.value < four.seconds.value and one.bytes <= four.bytes
    assert one.bytes > sum(weight.nbytes for weight in pipeline.transformer.parameters())


def test_an_engine_that_was_not_measured_is_said_to_count_as_the_models_own_code(measured: Any) -> None:
    pipeline, _, _, model = measured
    twin = accelerate(pipeline, parse_stack("Compile"))
    assert "counts as the model's own code" in " ".join(
        predict(model, pipeline, twin.fastdit.plan(64, 64, STEPS)).notes
    )


def test_costs_that_are_kept_are_a_part_of_every_plan(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, _, _, model = measured
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path))
    twin = accelerate(pipeline, parse_stack("Interval 2"))
    assert kept_model(pipeline) is None and "predicted" not in twin.fastdit.explain(96, 96, STEPS)
    keep_model(pipeline, model)
    assert kept_model(pipeline) == model
    assert "FLOPs in the transformer" in twin.fastdit.explain(96, 96, STEPS)
    other, _ = testing.PIPELINES["StableDiffusion3Pipeline"](size=64, steps=2, batch=1)
    assert place_of(other) != place_of(pipeline)


def test_costs_of_another_version_or_none_are_refused(measured: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pipeline, _, _, model = measured
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path))
    path = keep_model(pipeline, model)
    for text in (json.dumps({**model.to_json(), "format": 0}), "{}", "nothing"):
        path.write_text(text)
        with pytest.raises(InvalidConfig, match="anew"):
            kept_model(pipeline)


def test_a_pipeline_whose_tokens_are_unknown_is_refused() -> None:
    pipeline, call = testing.PIPELINES["PixArtSigmaPipeline"](size=64, steps=2, batch=1)
    with pytest.raises(UnsupportedModel, match="costs go by image tokens"):
        CostMeter(pipeline, call)


def test_live_bytes_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(500) + 1
    assert live.alive == kept.nbytes == 4000
    assert live.most == 4000 + 2 * 2000


def test_the_clock_changes_nothing(measured: Any) -> None:
    pipeline, call, meter, _ = measured
    given = {**call, "num_inference_steps": 2, "output_type": "np"}
    plain = pipeline(**given, generator=torch.Generator().manual_seed(1)).images
    clocked = meter._twin(**given, generator=torch.Generator().manual_seed(1)).images
    assert np.array_equal(plain, clocked)


def test_a_published_model_is_predicted_on_a_machine_that_is_not_here() -> None:
    plain = roofline.predict_on("flux-dev", "h100", parse_stack(""))
    assert 0.8 < plain.seconds.value / 6.447 < 1.2  # published: 6.447 s
    assert plain.lines()[1].startswith("a prediction by a roofline, which errs by")
    with pytest.raises(InvalidConfig, match="the machines are h100"):
        roofline.predict_on("flux-dev", "h1000", parse_stack(""))
    with pytest.raises(InvalidConfig, match="the published models are"):
        roofline.predict_on("flax-dev", "h100", parse_stack(""))


@pytest.mark.exhaustive
def test_the_roofline_that_is_kept_is_the_one_that_fits() -> None:
    kept, error = roofline.kept()
    found = roofline.fitted()
    assert (kept.compute, kept.memory) == pytest.approx((found.compute, found.memory))
    assert error == pytest.approx(roofline.held_out_error()) and error < 0.1
    assert 0 < kept.compute < 1 and 0 < kept.memory < 1


def test_the_command_plans_for_a_machine_in_words() -> None:
    arguments = ["plan", "flux-dev", "--machine", "h100", "--stack", "Interval 3", "--size", "512"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "predicted for flux-dev on h100, without it" in done.output


def test_the_errors_of_a_model_are_those_of_its_points(measured: Any) -> None:
    *_, meter, model = measured
    worse = replace(model, rest=replace(model.rest, seconds=Curve(call=1.0)))
    assert meter._error(worse) > model.error >= 0


class BusyClock:
    """A clock on which every tick of the first half takes so many seconds, and of the last half more."""

    def __init__(self, slower: float, half: int) -> None:
        self.now, self.read, self.slower, self.half = 0.0, 0, slower, half

    def __call__(self) -> float:
        self.read += 1
        self.now += 1e-3 * (self.slower if self.read > self.half else 1.0)
        return self.now


def by_clock(measured: Any, slower: float) -> CostModel:
    """Two rounds by a clock that slows down after the first."""
    pipeline, call, *_ = measured
    clock = BusyClock(slower, 10**9)
    meter = CostMeter(pipeline, call, parts=(0.5, 1.0), clock=clock)
    meter.round()
    clock.half = clock.read
    meter.round()
    return meter.fitted()


def test_costs_of_a_steady_machine_are_not_noisy(measured: Any) -> None:
    found = by_clock(measured, 1.1).steadiness
    assert found is not None and not found.noisy and found.drift == pytest.approx(0.1)


def test_costs_of_a_busy_machine_are_kept_as_noisy_and_every_prediction_says_by_how_much(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, *_ = measured
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path))
    path = keep_model(pipeline, by_clock(measured, 3.0))
    assert json.loads(path.read_text())["steadiness"]["noisy"] is True
    said = accelerate(pipeline, parse_stack("")).fastdit.explain(96, 96, STEPS)
    assert "these costs are noisy: of 4 timings of 1 x" in said
    assert "the last half 200% above the first" in said and "fastdit plan PIPE --measure" in said


def test_a_burst_that_hits_few_timings_leaves_costs_steady_and_a_long_one_does_not() -> None:
    few, many = ([1.0, 1.0, 1.0, 9.0, 1.0, 1.0], [1.0, 9.0, 9.0, 9.0, 9.0, 1.0])
    found = Steadiness.of({"few": few, "many": many})
    assert found is not None and (found.what, found.spread, found.noisy) == ("many", 8.0, True)
    steady = Steadiness.of({"few": few})
    assert steady is not None and not steady.noisy
    assert Steadiness.of({"once": [1.0, 5.0]}) is None


def test_costs_from_before_steadiness_was_asked_still_predict(measured: Any) -> None:
    *_, model = measured
    data = model.to_json()
    del data["steadiness"]
    assert CostModel.from_json(data).warning is None
