"""Named errors: what cannot be done is refused by name, says what to do, and is never half done."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from fastdit import (
    RALU,
    ConcurrentCall,
    FastditError,
    FirstBlockCache,
    IncompatibleStack,
    InvalidConfig,
    SkipPolicy,
    Stack,
    StepMask,
    TeaCache,
    UnsupportedModel,
    accelerate,
)
from fastdit.errors import FastditWarning, NeverFired

IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
NEVER = TeaCache(1e-12, coefficients=IDENTITY)
"""Asks for skips and never gets one."""


@pytest.mark.parametrize(
    "stack",
    [
        [RALU("4x"), RALU("7x")],
        [RALU("4x"), RALU("4x")],
        [FirstBlockCache(0.1), FirstBlockCache(0.2)],
        [FirstBlockCache(0.1), TeaCache(0.2, coefficients=IDENTITY)],
        [StepMask((1, 0)), TeaCache(0.2, coefficients=IDENTITY), RALU("4x")],
    ],
    ids=str,
)
def test_two_accelerators_of_one_level_are_refused_and_both_are_named(stack: list[Any]) -> None:
    pipe, call = tiny.flux()
    before = tiny.run(pipe, call)
    names = {type(part).__name__ for part in stack if not isinstance(part, RALU)} or {"RALU"}
    with pytest.raises(IncompatibleStack) as caught:
        accelerate(pipe, stack)
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(IncompatibleStack):
        Stack(stack).check(pipe)
    assert torch.equal(tiny.run(pipe, call), before)


@pytest.mark.parametrize("part", ["RALU", None, 3, RALU, torch.nn.Identity(), {"type": "RALU"}], ids=str)
def test_something_that_is_no_accelerator_is_refused(part: Any) -> None:
    pipe, _ = tiny.flux()
    with pytest.raises((FastditError, TypeError)):
        accelerate(pipe, [part])


@pytest.mark.parametrize(
    "thing", [None, 3, "FluxPipeline", object(), nn.Linear(2, 2)], ids=lambda value: type(value).__name__
)
def test_something_that_is_no_pipeline_or_transformer_is_refused(thing: Any) -> None:
    with pytest.raises((UnsupportedModel, TypeError)):
        accelerate(thing, [FirstBlockCache(0.1)])


def test_a_model_whose_blocks_cannot_be_established_is_refused_and_says_what_was_seen() -> None:
    class Shuffled(nn.Module):
        """Its blocks run in an order that depends on the data: no wiring explains that."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Tensor:
            for index in (2, 0, 1, 0):
                hidden_states = self.blocks[index](hidden_states * 1.5)
            return hidden_states

    model = Shuffled()
    with pytest.raises(UnsupportedModel) as caught, torch.no_grad():
        twin = accelerate(model, [FirstBlockCache(0.1)])
        with twin.fastdit.run(num_inference_steps=3):
            twin(torch.ones(1, 3, 4))
    assert "Shuffled" in str(caught.value)
    assert torch.isfinite(model(torch.ones(1, 3, 4))).all()


def test_an_image_to_image_input_is_honoured_by_the_pipeline_s_own_class() -> None:
    """A FLUX.2 call with a reference picture has more image tokens; a cache must take them as they come."""
    from PIL import Image

    pipe, call = tiny.flux2(steps=4)
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    plain = tiny.run(pipe, call, image=picture, height=64, width=64)
    assert torch.equal(tiny.run(accelerate(pipe, []), call, image=picture, height=64, width=64), plain)
    cached = tiny.run(accelerate(pipe, [FirstBlockCache(1e6)]), call, image=picture, height=64, width=64)
    assert torch.isfinite(cached).all()


@pytest.mark.parametrize("stack", [[], [FirstBlockCache(1e6)], [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)]])
def test_a_second_thread_is_refused_and_the_first_call_finishes_untouched(stack: list[Any]) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, stack)
    expected = tiny.run(fast, call)
    inside, go_on = threading.Event(), threading.Event()
    results: dict[str, Any] = {}

    def wait(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inside.set()
            assert go_on.wait(20)
        return {}

    def first() -> None:
        results["first"] = tiny.run(fast, call, callback_on_step_end=wait)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(ConcurrentCall, match=r"twin|accelerate"):
            tiny.run(fast, call)
        with pytest.raises(ConcurrentCall):
            tiny.run(fast, call)
    finally:
        go_on.set()
        thread.join(20)
    assert torch.equal(results["first"], expected)
    assert torch.equal(tiny.run(fast, call), expected)


def test_a_second_call_from_within_a_callback_is_refused_too() -> None:
    pipe, call = tiny.flux(steps=4)
    fast = accelerate(pipe, [FirstBlockCache(1e6)])
    expected = tiny.run(fast, call)
    caught = []

    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            with pytest.raises(ConcurrentCall) as error:
                tiny.run(fast, call)
            caught.append(error)
        return {}

    assert torch.equal(tiny.run(fast, call, callback_on_step_end=callback), expected)
    assert len(caught) == 1


def test_two_twins_of_one_pipeline_run_in_two_threads() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    stacks = [FirstBlockCache(1e6)], [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)]
    twins = [accelerate(pipe, stack) for stack in stacks]
    expected = [tiny.run(twin, call) for twin in twins]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, twin=twin: found.update({i: tiny.run(twin, call)}))
        for i, twin in enumerate(twins)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_two_runs_of_a_bare_twin_cannot_be_open_at_once() -> None:
    twin = accelerate(tiny.flux_transformer(), [])
    opened = twin.fastdit.run(num_inference_steps=2)
    with opened, pytest.raises(ConcurrentCall), twin.fastdit.run(num_inference_steps=2):
        pass
    with twin.fastdit.run(num_inference_steps=2):
        pass


@pytest.mark.parametrize(
    "cache", [FirstBlockCache(1e6), TeaCache(1e6, coefficients=IDENTITY)], ids=lambda cache: type(cache).__name__
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_signal_that_is_not_finite_computes_and_warns_once(cache: Any, value: float) -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [cache])

    def spoil(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return {}
        latents = tensors["latents"].clone()
        latents[0, 0, 0] = value
        return {"latents": latents}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.run(fast, call, callback_on_step_end=spoil, output_type="latent")
    record = fast.fastdit.last_run
    assert [step.action == "computed" for step in record.steps] == [True, False, True, True, True, True]
    assert record.doubts >= 1
    ours = [entry for entry in caught if issubclass(entry.category, FastditWarning)]
    assert len(ours) == 1
    assert "finite" in str(ours[0].message)


def test_an_accelerator_that_never_fired_warns_by_name() -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [NEVER])
    with pytest.warns(NeverFired, match="TeaCache"):
        found = tiny.run(fast, call)
    assert torch.equal(found, tiny.run(pipe, call))


def test_an_accelerator_that_never_fired_raises_under_strict() -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [NEVER], strict=True)
    assert fast.fastdit.strict
    for _ in range(2):
        with pytest.raises((FastditError, NeverFired), match="TeaCache"):
            tiny.run(fast, call)


@pytest.mark.parametrize(
    "stack",
    [[], [FirstBlockCache(0.0)], [TeaCache(0.0, coefficients=IDENTITY)], [StepMask((1, 1, 1, 1))]],
    ids=["empty", "first block", "teacache", "mask"],
)
def test_a_neutral_setting_is_what_was_asked_for_and_does_not_warn(stack: list[Any]) -> None:
    pipe, call = tiny.flux(steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastditWarning)
        tiny.run(accelerate(pipe, stack, strict=True), call)


def test_an_accelerator_that_fired_does_not_warn_even_under_strict() -> None:
    pipe, call = tiny.flux(steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastditWarning)
        tiny.run(accelerate(pipe, [FirstBlockCache(1e6)], strict=True), call)


def test_an_interrupted_or_failed_run_does_not_complain_that_nothing_fired() -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [FirstBlockCache(1e6)], strict=True)

    def callback(twin: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = True
        return {}

    with warnings.catch_warnings():
        warnings.simplefilter("error", FastditWarning)
        tiny.run(fast, call, callback_on_step_end=callback)


def test_a_bare_run_that_is_called_once_too_often_says_so() -> None:
    pipe, call = tiny.flux(steps=4)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6)])
    with (
        pytest.raises(InvalidConfig, match="num_inference_steps"),
        torch.no_grad(),
        twin.fastdit.run(num_inference_steps=3),
    ):
        for args, kwargs in calls:
            twin(*args, **kwargs)


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, "4"])
def test_a_bare_run_needs_a_count_of_steps(steps: Any) -> None:
    twin = accelerate(tiny.flux_transformer(), [FirstBlockCache(1e6)])
    with pytest.raises((InvalidConfig, TypeError)), twin.fastdit.run(num_inference_steps=steps):
        pass


@pytest.mark.parametrize("branches", [(), ("cond", "cond"), "cond"])
def test_branches_of_a_bare_run_must_be_named_apart(branches: Any) -> None:
    twin = accelerate(tiny.flux_transformer(), [FirstBlockCache(1e6)])
    with pytest.raises(InvalidConfig), twin.fastdit.run(num_inference_steps=2, branches=branches):
        pass


def test_skip_layer_guidance_is_honoured_or_refused_by_name() -> None:
    pipe, call = tiny.sd3(steps=6)
    changes = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    plain = tiny.run(pipe, call, **changes)
    assert not torch.equal(plain, tiny.run(pipe, call))
    assert torch.equal(tiny.run(accelerate(pipe, []), call, **changes), plain)
    neutral = accelerate(pipe, [FirstBlockCache(0.0)])
    try:
        found = tiny.run(neutral, call, **changes)
    except FastditError as error:
        assert "skip" in str(error)
    else:
        assert torch.equal(found, plain)
        cached = tiny.run(accelerate(pipe, [FirstBlockCache(1e6)]), call, **changes)
        assert torch.isfinite(cached).all()


def test_controlnet_residuals_are_honoured_or_refused_by_name() -> None:
    pipe, call = tiny.flux(steps=4)
    calls = tiny.recorded_calls(pipe, call)
    residuals = [tiny.randn(1, 16, 32, seed=31), tiny.randn(1, 16, 32, seed=32)]
    singles = [tiny.randn(1, 16, 32, seed=33)]
    extra = {"controlnet_block_samples": residuals, "controlnet_single_block_samples": singles}
    with torch.no_grad():
        plain = [pipe.transformer(*args, **kwargs, **extra)[0] for args, kwargs in calls]
    for stack in ([], [FirstBlockCache(0.0)]):
        twin = accelerate(pipe.transformer, stack)
        try:
            with torch.no_grad(), twin.fastdit.run(num_inference_steps=4):
                found = [twin(*args, **kwargs, **extra)[0] for args, kwargs in calls]
        except FastditError as error:
            assert "controlnet" in str(error)
            assert stack
        else:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


def test_skipped_steps_with_controlnet_residuals_never_drop_them_silently() -> None:
    pipe, call = tiny.flux(steps=4)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=0))])

    def run(scale: float) -> Tensor:
        extra = {"controlnet_block_samples": [scale * tiny.randn(1, 16, 32, seed=31)] * 2}
        with torch.no_grad(), twin.fastdit.run(num_inference_steps=4):
            return [twin(*args, **kwargs, **extra)[0] for args, kwargs in calls][-1]

    try:
        weak, strong = run(0.1), run(3.0)
    except FastditError as error:
        assert "controlnet" in str(error)
        return
    assert not torch.equal(weak, strong)


def test_the_errors_are_a_family_and_behave_like_python_s_own() -> None:
    assert issubclass(InvalidConfig, ValueError)
    assert issubclass(ConcurrentCall, RuntimeError)
    for error in (UnsupportedModel, IncompatibleStack, InvalidConfig, ConcurrentCall):
        assert issubclass(error, FastditError)


@pytest.mark.parametrize("field", ["threshold"])
def test_accelerators_are_frozen_and_compare_by_value(field: str) -> None:
    one, other = FirstBlockCache(0.1), FirstBlockCache(0.1)
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(AttributeError):
        setattr(one, field, 0.5)


def test_a_model_of_single_blocks_is_told_that_a_chain_takes_two() -> None:
    pipe, call = tiny.flux()
    pipe.transformer = tiny.flux_transformer(layers=1, single_layers=1)
    with pytest.raises(UnsupportedModel, match="single_transformer_blocks, transformer_blocks called one block each"):
        tiny.run(accelerate(pipe, [FirstBlockCache(0.1)]), call)
