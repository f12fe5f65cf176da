"""Leading and trailing blocks, decisions by block list, images decided one by one, histories carried, memory."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from fastdit import (
    RALU,
    DBCache,
    EasyCache,
    FirstBlockCache,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    NeverFired,
    Reuse,
    SeaCache,
    SkipPolicy,
    StepMask,
    Taylor,
    TeaCache,
    UnsupportedModel,
    accelerate,
)

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 12
LINE = (1.0, 0.0)
ALWAYS = SkipPolicy(first=1, last=0)


def deep_flux(steps: int = STEPS, batch: int = 1) -> Any:
    pipe, call = tiny.flux(steps=steps, batch=batch)
    pipe.transformer = tiny.flux_transformer(layers=4, single_layers=5)
    return pipe, call


def test_leading_and_trailing_blocks_run_at_every_step() -> None:
    pipe, call = deep_flux()
    fast = accelerate(pipe, [FirstBlockCache(100.0, leading=2, trailing=3, policy=ALWAYS)])
    tiny.run(fast, call)
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    assert counts == [STEPS] * 2 + [1] * 4 + [STEPS] * 3


def test_by_list_every_block_list_has_its_own_leading_and_trailing_blocks() -> None:
    pipe, call = deep_flux()
    fast = accelerate(pipe, [DBCache(100.0, 1, 1, first=1)])
    tiny.run(fast, call)
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    assert counts == [STEPS, 1, 1, STEPS, STEPS, 1, 1, 1, STEPS]


def test_by_list_one_list_may_be_skipped_while_the_other_runs() -> None:
    pipe, call = deep_flux(steps=20)
    fast = accelerate(pipe, [DBCache(0.55, 1, 0, first=1)])
    tiny.run(fast, call)
    actions = [step.action for step in fast.fastdit.last_run.steps]
    assert "partial" in actions


def test_a_whole_stack_and_lists_that_agree_give_the_same_picture() -> None:
    """A residual is a sum: split by list it adds up to the stack's."""
    pipe, call = deep_flux()
    policy = SkipPolicy(first=1, last=0)
    stack, lists = (
        accelerate(pipe, [Interval(3, scope=scope, forecast=Taylor(1), policy=policy)]) for scope in ("stack", "list")
    )
    torch.testing.assert_close(tiny.run(lists, call), tiny.run(stack, call), rtol=1e-3, atol=1e-4)
    assert [s.action for s in lists.fastdit.last_run.steps] == [s.action for s in stack.fastdit.last_run.steps]


@pytest.mark.parametrize("cache", [Interval(3, scope="forward", policy=ALWAYS), EasyCache(100.0)], ids=str)
def test_by_forward_a_skipped_step_runs_nothing(cache: Any) -> None:
    pipe, call = deep_flux()
    fast = accelerate(pipe, [cache])
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert counts == [record.computed] * 9 and record.computed < STEPS
    assert all(step.flops == 0 for step in record.steps if step.action == "reused")


@pytest.mark.parametrize("make", [TeaCache, FirstBlockCache, SeaCache], ids=lambda make: make.__name__)
def test_a_gate_whose_signal_lies_inside_can_t_skip_whole_forwards(make: Any) -> None:
    with pytest.raises(InvalidConfig, match="scope"):
        make(0.1, scope="forward")


def test_more_fixed_blocks_than_there_are_is_refused_with_the_counts() -> None:
    pipe, call = deep_flux()
    fast = accelerate(pipe, [DBCache(0.1, 3, 2)])
    with pytest.raises(InvalidConfig, match="3 leading and 2 trailing"):
        tiny.run(fast, call)


PER_IMAGE = {
    "TeaCache": TeaCache(0.6, LINE, per_image=True),
    "FirstBlockCache": FirstBlockCache(0.7, per_image=True),
    "with Taylor": FirstBlockCache(0.7, per_image=True, forecast=Taylor(1)),
    "by list": FirstBlockCache(0.8, per_image=True, scope="list"),
    "EasyCache": EasyCache(0.5, per_image=True),
    "SeaCache": SeaCache(0.8, per_image=True),
}


def unlike_prompts() -> Any:
    """Four prompts of very different strength, so that the images part at some steps."""
    pipe, call = tiny.flux(steps=STEPS, batch=4)
    scale = torch.tensor([0.05, 1.0, 4.0, 0.5])
    call["prompt_embeds"] = call["prompt_embeds"] * scale[:, None, None]
    call["pooled_prompt_embeds"] = call["pooled_prompt_embeds"] * scale[:, None]
    return pipe, call


def in_a_batch(fast: Any, call: dict[str, Any]) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    return fast(**{**call, "output_type": "latent"}, generator=generators).images


def by_itself(fast: Any, call: dict[str, Any], index: int) -> Tensor:
    own = {name: call[name][index : index + 1] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeverFired)  # one of the four may have nothing to skip
        return tiny.run(fast, {**call, **own}, seed=index, output_type="latent")


@pytest.mark.parametrize("cache", PER_IMAGE.values(), ids=PER_IMAGE.keys())
def test_an_image_decided_by_itself_does_not_depend_on_its_batch_mates(cache: Any) -> None:
    pipe, call = unlike_prompts()
    fast = accelerate(pipe, [cache])
    together = in_a_batch(fast, call)
    record = fast.fastdit.last_run
    assert record.partial > 0
    alone_saved = 0
    for index in range(4):
        alone = by_itself(fast, call, index)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-4)
        alone_saved += sum(step.full_flops for step in fast.fastdit.last_run.steps) - fast.fastdit.last_run.flops
    saved = sum(step.full_flops for step in record.steps) - record.flops
    # The first forward of the twin was observed, and so computed, whatever the cache said.
    assert abs(saved - alone_saved) <= 0.15 * alone_saved


def test_without_per_image_a_batch_mate_does_decide() -> None:
    """The control of the test above: one decision for all makes an image depend on the others."""
    pipe, call = unlike_prompts()
    fast = accelerate(pipe, [FirstBlockCache(0.7)])
    together = in_a_batch(fast, call)
    alone = [by_itself(fast, call, index) for index in range(4)]
    assert not torch.allclose(together, torch.cat(alone), rtol=1e-2, atol=1e-2)


def test_blocks_that_mix_the_images_of_a_batch_are_refused_by_per_image() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(_MixingBlock() for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Tensor:
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    twin = accelerate(Mixing(), [FirstBlockCache(0.15, per_image=True, policy=ALWAYS)])
    latents = torch.stack([torch.ones(3, 4), torch.linspace(0, 1, 12).reshape(3, 4)])
    with pytest.raises(UnsupportedModel, match="one by one"), twin.fastdit.run(num_inference_steps=12):
        for step in range(12):
            twin(latents * torch.tensor([1.0, 1.0 + 0.4 * step])[:, None, None])


class _MixingBlock(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + hidden_states**2 * 0.1 + 0.01 * hidden_states.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("forecast", [Reuse(), Taylor(1)], ids=str)
def test_a_carried_history_lets_the_first_step_of_a_stage_be_skipped(forecast: Any) -> None:
    pipe, call = tiny.flux(size=128, batch=2)
    call.pop("num_inference_steps")
    mask = (1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1)
    ralu = RALU.paper("4x", fidelity="exact")
    kept, lost = (
        accelerate(pipe, [ralu, StepMask(mask, forecast=forecast, stage_change=change)])
        for change in ("carry", "reset")
    )
    carried, reset = tiny.run(kept, call), tiny.run(lost, call)
    assert torch.isfinite(carried).all()
    assert [step.action == "computed" for step in kept.fastdit.last_run.steps] == [bool(entry) for entry in mask]
    first = [step for step in lost.fastdit.last_run.steps if step.step in (5, 11)]
    assert [step.reason for step in first] == ["first step of a stage"] * 2
    assert not torch.equal(carried, reset)


def test_whole_latents_that_change_their_shape_with_the_stage_are_not_carried_and_that_is_said() -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    stages = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
    lost, kept = (
        accelerate(pipe, [stages, Interval(2, scope="forward", stage_change=change)]) for change in ("reset", "carry")
    )
    assert torch.isfinite(tiny.run(lost, call)).all()
    with pytest.raises(IncompatibleStack, match="keeps whole latents"):
        tiny.run(kept, call)


def test_a_residual_that_is_the_same_everywhere_is_carried_exactly() -> None:
    """Lifting copies tokens, so what does not depend on the token must come out as if nothing had happened."""
    from fastdit.layout import CoarseLayout, FineLayout

    coarse = CoarseLayout(8, 8)
    values = torch.arange(16.0)[None, :, None]
    refined = torch.tensor([[1, 6, 15]])
    mixed = coarse.refined_at(refined)
    latents = torch.cat([values[:, mixed.kept[0]], values[:, refined[0]].repeat_interleave(4, dim=1)], dim=1)
    torch.testing.assert_close(values[:, coarse.sources(mixed)[0]], latents)
    fine = FineLayout(8, 8)
    expected = mixed.to_raster(mixed.complete(latents))
    torch.testing.assert_close(latents[:, mixed.sources(fine)[0]], expected)


@pytest.mark.parametrize(
    "cache",
    [TeaCache(0.6, LINE), FirstBlockCache(0.8), Interval(3), SeaCache(0.9), EasyCache(0.9)],
    ids=lambda cache: type(cache).__name__,
)
def test_a_residual_cache_holds_at_most_two_copies_of_the_hidden_states_per_branch(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [cache])
    tiny.run(fast, call)
    width, tokens = 32, 16 + 6
    copy = tokens * width * 4
    assert 0 < fast.fastdit.last_run.cache_bytes <= 2 * copy
    alone = fast.fastdit.last_run.cache_bytes
    tiny.run(fast, tiny.flux_negative(call))
    assert fast.fastdit.last_run.cache_bytes <= 2 * alone


def test_an_order_more_costs_a_copy_more() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    sizes = []
    for order in (0, 1, 2):
        fast = accelerate(pipe, [Interval(2, forecast=Taylor(order))])
        tiny.run(fast, call)
        sizes.append(fast.fastdit.last_run.cache_bytes)
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_to_skip_anything_says_so_before_it_starts(steps: int) -> None:
    pipe, call = tiny.flux(steps=steps)
    fast = accelerate(pipe, [FirstBlockCache(0.5)], strict=True)
    with tiny.counted_blocks(pipe.transformer) as counts, pytest.raises(NeverFired, match="skip none"):
        tiny.run(fast, call)
    assert counts == [0] * 5
    assert "skip none" in str(fast.fastdit.plan(64, 64, steps))


def test_a_plan_of_few_steps_says_how_many_can_be_skipped_at_most() -> None:
    pipe, _ = tiny.flux()
    assert "at most 2 of 4 steps" in str(accelerate(pipe, [FirstBlockCache(0.5)]).fastdit.plan(64, 64, 4))
