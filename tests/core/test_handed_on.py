"""Arguments of a call reach the class that takes them, whatever stands before it, and those of no use are refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import FluxPipeline

import fastdit
from fastdit import RALU, InvalidConfig, ProgressiveResolution, accelerate
from fastdit.nested import call_signature
from fastdit.testing import generate, tiny_flux


class Named(FluxPipeline):  # type: ignore[misc]
    """Hands on what it does not take itself, by name."""

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        return super().__call__(prompt, num_inference_steps=kwargs.pop("num_inference_steps", 12), **kwargs)


class Placed(FluxPipeline):  # type: ignore[misc]
    """Hands everything on, with another default."""

    def __call__(self, *args: Any, guidance_scale: float = 1.5, **kwargs: Any) -> Any:
        return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)


class Sized(FluxPipeline):  # type: ignore[misc]
    """Makes pictures of one size."""

    def __call__(self, prompt: Any = None, num_inference_steps: int = 4) -> Any:
        return super().__call__(prompt, num_inference_steps=num_inference_steps)


def made(cls: type, size: int = 64) -> tuple[Any, dict[str, Any]]:
    pipeline, call = tiny_flux(steps=12)
    pipeline.__class__ = cls
    return pipeline, {**call, "height": size, "width": size}


def test_a_signature_is_that_of_the_class_s_whole_line() -> None:
    whole, behind = call_signature(Placed), inspect.signature(FluxPipeline.__call__)
    assert set(whole.parameters) == {*behind.parameters, "args", "kwargs"}
    bound = whole.bind(None, "a fish", None, None, None, 1.0, 64)
    bound.apply_defaults()
    assert bound.arguments["height"] == 64 and bound.arguments["guidance_scale"] == 1.5
    assert call_signature(FluxPipeline) == behind
    assert call_signature(Named).parameters["height"].kind is inspect.Parameter.KEYWORD_ONLY
    assert call_signature(type(fastdit.load_mini())).parameters["num_inference_steps"].default == 50


@pytest.mark.parametrize("cls", [FluxPipeline, Named, Placed])
def test_a_plan_and_a_run_are_of_the_size_that_was_asked_for(cls: type) -> None:
    pipeline, call = made(cls, 128)
    fast = accelerate(pipeline, [ProgressiveResolution(steps=(2, 2))])
    assert "64 tokens" in fast.fastdit.explain(128, 128) and "16 tokens" in fast.fastdit.explain(64, 64)
    del call["num_inference_steps"]
    generate(fast, call)
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16, 16, 64, 64]


def test_arguments_by_place_reach_a_schedule() -> None:
    pipeline, call = made(Placed)
    embeds = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    fast = accelerate(pipeline, [ProgressiveResolution(steps=(6, 6))])
    fast(None, None, None, None, 1.0, 128, 64, 4, output_type="latent", **embeds)
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [8, 8, 32, 32]


def test_a_size_that_a_class_does_not_take_is_refused() -> None:
    fast = accelerate(made(Sized)[0], [])
    for plan in (fast.fastdit.plan, fast.fastdit.warmup):
        with pytest.raises(InvalidConfig, match="Sized takes no height and no width"):
            plan(64, 64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"height": -16}, "height is a number of pixels, got -16"),
        ({"width": 8}, "64 x 8 px are too few for one token"),
        ({"prompt": []}, "prompt is an empty list"),
    ],
)
@pytest.mark.parametrize("stack", [[], [RALU("4x")]], ids=str)
def test_a_call_for_no_picture_is_refused_before_any_work(call: dict[str, Any], said: str, stack: list[Any]) -> None:
    pipeline, given = made(FluxPipeline)
    fast = accelerate(pipeline, stack)
    with pytest.raises(InvalidConfig, match=said):
        fast(**{**given, **call})
    assert fast.fastdit.last_run is None


@pytest.mark.parametrize("stack", [[], [RALU("4x")]], ids=str)
@pytest.mark.parametrize(
    ("plan", "said"),
    [((-5, 64, None), "height"), ((64, 8, None), "too few"), ((64, 64, 0), "steps"), ((64, 64, 2.5), "steps")],
)
def test_a_plan_refuses_what_no_call_could_do(plan: tuple[Any, ...], said: str, stack: list[Any]) -> None:
    fast = accelerate(made(FluxPipeline)[0], stack)
    with pytest.raises(InvalidConfig, match=said):
        fast.fastdit.plan(*plan)


@pytest.mark.parametrize("stack", [[], [ProgressiveResolution(steps=(2, 2))]], ids=str)
def test_a_plan_says_that_a_size_is_cut(stack: list[Any]) -> None:
    fast = accelerate(made(FluxPipeline)[0], stack)
    assert "100 x 64 px are no whole number of tokens" in fast.fastdit.explain(100, 64)
    assert "whole number" not in fast.fastdit.explain(64, 64)
