"""Whatever ends a run at whatever step, the next call is a fresh twin's, and no cached tensor lives on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from fastdit import (
    RALU,
    FirstBlockCache,
    StepMask,
    Taylor,
    TeaCache,
    accelerate,
)

IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
RALU_SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
STACKS = {
    "teacache": [TeaCache(0.8, coefficients=IDENTITY)],
    "first block with taylor": [FirstBlockCache(1.0, forecast=Taylor(order=1))],
    "mask with taylor": [StepMask((1, 1, 0, 1, 0, 1), forecast=Taylor(order=2))],
    "ralu": [RALU_SHORT],
    "ralu and teacache": [RALU_SHORT, TeaCache(1e6, coefficients=IDENTITY)],
}
EACH = pytest.mark.parametrize("stack", STACKS)
#: The first, one that is skipped and the last; the others in the exhaustive part.
STEPS = [pytest.param(step, marks=[] if step in (0, 3, 5) else pytest.mark.exhaustive) for step in range(6)]


class Boom(Exception):
    """What a user's own code may raise."""


@pytest.fixture(scope="module")
def built() -> tiny.Built:
    return tiny.flux(size=128, steps=6)


@pytest.fixture(scope="module")
def expected(built: tiny.Built) -> dict[str, torch.Tensor]:
    """What a fresh twin of each stack gives."""
    return {name: tiny.run(accelerate(built[0], stack), built[1]) for name, stack in STACKS.items()}


def raiser(when: int, error: type[BaseException]) -> Any:
    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == when:
            raise error
        return {}

    return callback


@contextmanager
def failing_block(transformer: nn.Module, call: int, error: type[BaseException], index: int = 0) -> Iterator[None]:
    """Make the block number `index` raise in its call number `call`, after it has run."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error

    handle = tiny.main_blocks(transformer)[index].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@EACH
@pytest.mark.parametrize("error", [Boom, pytest.param(KeyboardInterrupt, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("step", STEPS)
def test_after_an_exception_in_a_callback_the_next_call_is_a_fresh_twin_s(
    stack: str, step: int, error: type[BaseException], built: tiny.Built, expected: dict[str, torch.Tensor]
) -> None:
    pipe, call = built
    fast = accelerate(pipe, STACKS[stack])
    with pytest.raises(error):
        tiny.run(fast, call, callback_on_step_end=raiser(step, error))
    assert not fast.fastdit.last_run.completed
    assert len(fast.fastdit.last_run.steps) == step + 1
    assert torch.equal(tiny.run(fast, call), expected[stack])
    assert fast.fastdit.last_run.completed


@EACH
@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize(
    "step", [0, pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(5, marks=pytest.mark.exhaustive)]
)
def test_after_an_exception_within_a_block_the_next_call_is_a_fresh_twin_s(
    stack: str, step: int, block: int, built: tiny.Built, expected: dict[str, torch.Tensor]
) -> None:
    pipe, call = built
    fast = accelerate(pipe, STACKS[stack])
    tiny.run(fast, call)
    with failing_block(pipe.transformer, step, KeyboardInterrupt, block):
        try:
            tiny.run(fast, call)
        except KeyboardInterrupt:
            assert not fast.fastdit.last_run.completed
    assert torch.equal(tiny.run(fast, call), expected[stack])


@EACH
def test_after_an_exception_in_the_very_first_forward_of_a_twin_the_next_call_is_a_fresh_twin_s(
    stack: str, built: tiny.Built, expected: dict[str, torch.Tensor]
) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, STACKS[stack])
    for block in (0, 2, 4):
        with failing_block(pipe.transformer, 0, Boom, block), pytest.raises(Boom):
            tiny.run(fast, call)
    assert torch.equal(tiny.run(fast, call), expected[stack])


@EACH
@pytest.mark.parametrize("step", STEPS)
def test_after_an_interrupt_the_next_call_is_a_fresh_twin_s(
    stack: str, step: int, built: tiny.Built, expected: dict[str, torch.Tensor]
) -> None:
    pipe, call = built
    fast = accelerate(pipe, STACKS[stack])

    def callback(twin: Any, now: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = now == step
        return {}

    found = tiny.run(fast, call, callback_on_step_end=callback)
    assert tuple(found.shape) == (1, 3, 128, 128)
    assert torch.equal(tiny.run(fast, call), expected[stack])


@EACH
def test_bad_arguments_leave_the_twin_as_it_was(
    stack: str, built: tiny.Built, expected: dict[str, torch.Tensor]
) -> None:
    pipe, call = built
    fast = accelerate(pipe, STACKS[stack])
    for changes in ({"prompt_embeds": None}, {"latents": torch.zeros(1, 5, 16)}, {"output_type": "pt", "sigmas": "no"}):
        with pytest.raises(Exception):  # noqa: B017 - whatever diffusers, torch or fastdit make of it
            tiny.run(fast, call, **changes)
    assert torch.equal(tiny.run(fast, call), expected[stack])


def hidden_tensors() -> int:
    """Live tensors, parameters apart, of a batch of five: streams of width 32 and packed latents of width 16."""
    gc.collect()
    count = 0
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.ndim == 3:
            count += thing.shape[0] == 5 and thing.shape[-1] in (16, 32)
    return count


def batch_of_five() -> tiny.Built:
    """A batch whose tensors no other test of the process has."""
    pipe, call = tiny.flux(size=128, steps=6)
    embeds = {name: tiny.randn(5, *call[name].shape[1:], seed=41) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    return pipe, {**call, **embeds}


@EACH
@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("way", ["to its end", "exception", "keyboard", "interrupt", "block"])
def test_no_cached_tensor_is_alive_after_a_run_whatever_its_end(stack: str, way: str) -> None:
    pipe, call = batch_of_five()
    fast = accelerate(pipe, STACKS[stack])
    before = hidden_tensors()
    alive = []

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            alive.append(hidden_tensors())
            if way == "exception":
                raise Boom
            if way == "keyboard":
                raise KeyboardInterrupt
            twin._interrupt = way == "interrupt"
        return {}

    if way == "block":
        with failing_block(pipe.transformer, 1, Boom), pytest.raises(Boom):
            tiny.run(fast, call)
    elif way in ("exception", "keyboard"):
        with pytest.raises((Boom, KeyboardInterrupt)):
            tiny.run(fast, call, callback_on_step_end=callback)
    else:
        tiny.run(fast, call, callback_on_step_end=callback)
    if alive:
        assert alive[0] > before, "the count must see what a run holds"
    assert hidden_tensors() == before
    assert fast.fastdit.last_run is not None


def test_a_bare_twin_s_run_that_is_left_by_an_exception_leaves_nothing_and_can_be_opened_again() -> None:
    pipe, call = tiny.flux(steps=4)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6)])

    def whole() -> list[torch.Tensor]:
        with torch.no_grad(), twin.fastdit.run(num_inference_steps=4):
            return [twin(*args, **kwargs)[0] for args, kwargs in calls]

    first = whole()
    with pytest.raises(Boom), torch.no_grad(), twin.fastdit.run(num_inference_steps=4):
        twin(*calls[2][0], **calls[2][1])
        raise Boom
    assert not twin.fastdit.last_run.completed
    for mine, theirs in zip(whole(), first, strict=True):
        assert torch.equal(mine, theirs)
