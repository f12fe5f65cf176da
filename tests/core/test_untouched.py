"""The user's pipeline is never touched: not while a twin is made, not in the middle of its run, not afterwards."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from fastdit import (
    RALU,
    Attention,
    FirstBlockCache,
    StepMask,
    TeaCache,
    accelerate,
)

STACKS = {
    "empty": [],
    "first block": [FirstBlockCache(1e6)],
    "teacache": [TeaCache(0.8, coefficients=(0, 0, 0, 1, 0))],
    "attention": [Attention("_native_math")],
    "mask": [StepMask((1, 0, 0, 1, 0, 1))],
    "ralu": [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)],
    "ralu and teacache": [
        RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3),
        TeaCache(0.8, coefficients=(0, 0, 0, 1, 0)),
    ],
}


def fingerprint(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything of a pipeline that an accelerator could have changed, by identity."""
    print_: dict[str, Any] = {"pipe": snapshot(pipe), "components": {n: id(c) for n, c in pipe.components.items()}}
    for name, component in pipe.components.items():
        if component is None:
            continue
        print_[name] = snapshot(component)
        if isinstance(component, torch.nn.Module):
            print_[name + ".modules"] = [(n, id(m), *snapshot(m)) for n, m in component.named_modules()]
            print_[name + ".tensors"] = [
                (n, id(t), t._version) for n, t in [*component.named_parameters(), *component.named_buffers()]
            ]
    return print_


def snapshot(thing: Any) -> tuple[Any, ...]:
    values = []
    for name, value in sorted(vars(thing).items()):
        content = tuple(value) if isinstance(value, (dict, list)) else None
        values.append((name, id(value), content))
    # __slotnames__ is what Python itself keeps of a class whose instance was copied once.
    classes = tuple(
        (cls, tuple(sorted(set(vars(cls)) - {"__slotnames__"}))) for cls in type(thing).__mro__ if cls is not object
    )
    return type(thing), tuple(values), classes


def settle(pipe: DiffusionPipeline, call: dict[str, Any]) -> torch.Tensor:
    """Run the plain pipeline once, so that what diffusers itself sets lazily is there; its output."""
    return tiny.run(pipe, call)


@pytest.mark.parametrize("stack", STACKS)
def test_the_pipeline_is_the_same_before_during_and_after_a_run(stack: str) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    plain = settle(pipe, call)
    before = fingerprint(pipe)
    fast = accelerate(pipe, STACKS[stack])
    assert fingerprint(pipe) == before
    during: list[bool] = []

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        during.append(fingerprint(pipe) == before)
        return {}

    tiny.run(fast, call, callback_on_step_end=callback)
    assert during == [True] * 6
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(pipe, call), plain)


@pytest.mark.parametrize("stack", STACKS)
def test_the_pipeline_may_be_called_in_the_middle_of_its_twin_s_run(stack: str) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    plain = settle(pipe, call)
    fast = accelerate(pipe, STACKS[stack])
    undisturbed = tiny.run(fast, call)
    seen = []

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (1, 3):
            seen.append(torch.equal(tiny.run(pipe, call), plain))
        return {}

    assert torch.equal(tiny.run(fast, call, callback_on_step_end=callback), undisturbed)
    assert seen == [True, True]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_pipeline_is_untouched_by_a_cached_run(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    call = {**call, "output_type": "latent"}  # decoding changes the video autoencoders themselves
    plain = settle(pipe, call)
    before = fingerprint(pipe)
    tiny.run(accelerate(pipe, [FirstBlockCache(1e6)]), call)
    # The plain scheduler must not have moved either, although the twin's has.
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(pipe, call), plain)


def test_a_bare_transformer_is_untouched() -> None:
    pipe, call = tiny.flux()
    settle(pipe, call)
    calls = tiny.recorded_calls(pipe, call)
    before = fingerprint(pipe)
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6)])
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=4):
        for args, kwargs in calls:
            twin(*args, **kwargs)
            assert fingerprint(pipe) == before
    assert fingerprint(pipe) == before


def test_the_twin_is_of_the_pipeline_s_class_and_shares_its_weights() -> None:
    pipe, _ = tiny.flux()
    fast = accelerate(pipe, [FirstBlockCache(0.1)])
    assert isinstance(fast, type(pipe))
    assert type(fast).__name__ == type(pipe).__name__
    assert isinstance(fast.transformer, type(pipe.transformer))
    assert isinstance(fast.scheduler, type(pipe.scheduler))
    assert fast.vae is pipe.vae
    assert fast.fastdit.base is pipe
    assert fast.config == pipe.config
    assert fast.transformer.config == pipe.transformer.config
    mine, theirs = fast.transformer.state_dict(), pipe.transformer.state_dict()
    assert list(mine) == list(theirs)
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    assert [n for n, _ in fast.transformer.named_modules()] == [n for n, _ in pipe.transformer.named_modules()]
    assert list(fast.components) == list(pipe.components)


def test_other_pipelines_of_the_class_are_untouched() -> None:
    pipe, call = tiny.flux()
    other, _ = tiny.flux(seed=7)
    plain = tiny.run(other, call)
    fast = accelerate(pipe, [FirstBlockCache(1e6)])
    tiny.run(fast, call)
    assert torch.equal(tiny.run(other, call), plain)
    assert type(other) is type(pipe)
    assert type(fast) is not type(pipe)


def test_two_twins_of_one_pipeline_do_not_disturb_each_other() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    caching, drawing = accelerate(pipe, STACKS["first block"]), accelerate(pipe, STACKS["ralu"])
    alone = tiny.run(caching, call), tiny.run(drawing, call)
    inner = []

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inner.append(tiny.run(drawing, call))
        return {}

    assert torch.equal(tiny.run(caching, call, callback_on_step_end=callback), alone[0])
    assert torch.equal(inner[0], alone[1])
    assert torch.equal(tiny.run(drawing, call), alone[1])


def test_a_twin_goes_when_it_is_dropped_and_the_pipeline_stays() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, STACKS["ralu and teacache"])
    tiny.run(fast, call)
    watched = weakref.ref(fast), weakref.ref(fast.transformer), weakref.ref(fast.fastdit)
    del fast
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3
    assert torch.equal(tiny.run(pipe, call), plain)


def test_a_pipeline_can_go_when_it_and_its_twin_are_dropped() -> None:
    pipe, call = tiny.flux()
    fast = accelerate(pipe, STACKS["first block"])
    tiny.run(fast, call)
    watched = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe, fast
    gc.collect()
    assert [reference() for reference in watched] == [None] * 2
