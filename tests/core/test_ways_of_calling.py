"""Forwards that are written or called in other ways than diffusers' are run as they are, or refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from fastdit import EasyCache, FastditError, FirstBlockCache, Interval, ToCa, UnsupportedModel, accelerate

STACKS: dict[str, list[Any]] = {
    "empty": [],
    "first block": [FirstBlockCache(0.0)],
    "interval": [Interval(1)],
    "tokens": [ToCa(1, 0.5, first=1)],
    "whole forwards": [EasyCache(0.0)],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden_states + scale * torch.tanh(self.linear(hidden_states))


class Model(nn.Module):
    by_name = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.tokens = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(8, 4)
        tiny.seed_weights(self, 3)

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states=hidden_states) if self.by_name else block(hidden_states)
        return self.out(hidden_states)

    def forward(this, latents: torch.Tensor) -> torch.Tensor:
        return this.run(this.embed(latents))


class OfAnything(Model):
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        own, *latents = args
        return own.run(own.embed(latents[0] if latents else kwargs["latents"]))


class OfMore(Model):
    def forward(self, latents: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.run(self.embed(latents + sum(more)))


class OfNumbers(Model):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.run(self.tokens(input_ids))


LATENTS = [tiny.randn(2, 5, 4, seed=seed) for seed in range(4)]


def outputs(model: Any, calls: list[Any], **names: Any) -> list[torch.Tensor]:
    run = model.fastdit.run(len(calls)) if hasattr(model, "fastdit") else contextlib.nullcontext()
    with torch.no_grad(), run:
        return [model(**dict.fromkeys(names, one)) if names else model(*one) for one in calls]


@pytest.mark.parametrize("stack", [stack for name, stack in STACKS.items() if name != "tokens"])
def test_a_forward_may_call_its_self_as_it_likes(stack: list[Any]) -> None:
    model = Model()
    plain = outputs(model, LATENTS, latents=None)
    assert all(map(torch.equal, outputs(accelerate(model, stack), LATENTS, latents=None), plain))
    twin = accelerate(model, [Interval(2)])
    outputs(twin, LATENTS, latents=None)
    assert twin.fastdit.last_run.skipped == 1


@pytest.mark.parametrize("stack", [stack for name, stack in STACKS.items() if name != "tokens"])
@pytest.mark.parametrize(("model", "extra"), [(OfAnything, 0), (OfMore, 0), (OfMore, 2)])
def test_arguments_without_names_are_taken_or_refused_by_name(model: Any, extra: int, stack: list[Any]) -> None:
    made, calls = model(), [(latents,) * (1 + extra) for latents in LATENTS]
    plain = outputs(made, calls)
    twin = accelerate(made, stack)
    if model is OfMore and not extra:
        assert all(map(torch.equal, outputs(twin, calls), plain))
    else:
        with pytest.raises(UnsupportedModel, match="give them by name"):
            outputs(twin, calls)
    if model is OfAnything:
        assert all(map(torch.equal, outputs(twin, LATENTS, latents=None), plain))


@pytest.mark.parametrize("stack", [stack for name, stack in STACKS.items() if name != "tokens"])
def test_a_first_argument_of_whole_numbers_is_run_or_refused_by_name(stack: list[Any]) -> None:
    model, ids = OfNumbers(), [torch.tensor([[1, 2, 3 + step]]) for step in range(4)]
    plain = outputs(model, ids, input_ids=None)
    try:
        found = outputs(accelerate(model, stack), ids, input_ids=None)
    except FastditError:
        assert stack
        return
    assert all(map(torch.equal, found, plain))


def test_blocks_that_are_called_by_name_here_and_by_place_there_are_refused_by_name() -> None:
    model = Model()
    twin = accelerate(model, [Interval(1)])
    outputs(twin, LATENTS[:1], latents=None)
    model.by_name = True
    with pytest.raises(UnsupportedModel, match="other names or places"):
        outputs(twin, LATENTS[:1], latents=None)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_the_plain_model_s_from_the_first_run_on_or_are_refused_by_name(
    stack: list[Any], checkpointing: bool
) -> None:
    pipe, call = tiny.flux(steps=3)
    calls = tiny.recorded_calls(pipe, call)
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()

    def gradients(module: Any, *, inside: bool = False) -> list[torch.Tensor]:
        pipe.transformer.zero_grad()
        run = module.fastdit.run(3) if hasattr(module, "fastdit") else contextlib.nullcontext()
        with run:
            loss = sum(module(*args, **kwargs)[0].square().sum() for args, kwargs in calls)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad.clone() for p in pipe.transformer.parameters() if p.grad is not None]

    plain, twin = gradients(pipe.transformer), accelerate(pipe.transformer, stack)
    for inside in (False, True, False):
        try:
            found = gradients(twin, inside=inside)
        except FastditError as error:
            assert checkpointing and "torch.no_grad()" in str(error)
            continue
        assert len(found) == len(plain) > 50
        assert all(map(torch.equal, found, plain))
    with torch.no_grad(), twin.fastdit.run(3):
        for args, kwargs in calls:
            twin(*args, **kwargs)
    assert twin.fastdit.last_run.completed
