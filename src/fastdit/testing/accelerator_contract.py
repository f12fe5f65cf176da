"""The promises that every accelerator keeps, as a test class: one subclass a method, for our tests and for adapters'.

    class TestMine(AcceleratorContract):
        accelerator = Mine(strength=2)     # one that does something in 12 steps of `tiny_flux`
        neutral = Mine(strength=0)         # one that must change nothing, or None

The pipelines are thousands of times smaller than a user's and made of the real diffusers classes with seeded weights.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator, Break, Change, Level
from fastdit.errors import FastditWarning
from fastdit.nested import tensors_of
from fastdit.stack import Stack
from fastdit.step_cache.base import StepCache
from fastdit.testing.models import STEPS, tiny_flux
from fastdit.testing.tiny import Built, Call, counted_calls, generate


class AcceleratorContract:
    """What every accelerator promises. Subclass it with an accelerator that acts within 12 steps of `tiny_flux`.

    `reads_signal` says that a signal decides, so that one which is not finite must be noticed.
    """

    accelerator: ClassVar[Accelerator]
    neutral: ClassVar[Accelerator | None] = None
    reads_signal: ClassVar[bool] = False

    def pipeline(self, **options: int) -> Built:
        """Make the pipeline and the arguments of a call."""
        return tiny_flux(**options)

    def test_it_acts_and_the_record_says_so(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator], strict=True)
        found = generate(fast, call)
        record = fast.fastdit.last_run
        assert torch.isfinite(found).all()
        assert record.completed and record.doubts == 0
        if self.accelerator.level in (Level.STEP_CACHE, Level.TOKEN_CACHE):
            assert record.skipped + record.partial > 0
            assert record.flops < sum(step.full_flops for step in record.steps)
            assert record.cache_bytes > 0

    def test_where_it_is_neutral_it_is_bit_equal_to_the_plain_pipeline(self) -> None:
        if self.neutral is None:
            return
        pipeline, call = self.pipeline()
        plain = generate(pipeline, call)
        assert torch.equal(generate(accelerate(pipeline, [self.neutral]), call), plain)

    def test_the_plain_pipeline_stays_as_it_was(self) -> None:
        pipeline, call = self.pipeline()
        before, modules = generate(pipeline, call), dict(pipeline.transformer.named_modules())
        generate(accelerate(pipeline, [self.accelerator]), call)
        assert dict(pipeline.transformer.named_modules()) == modules
        assert torch.equal(generate(pipeline, call), before)

    def test_a_second_call_knows_nothing_of_the_first(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        first, other = generate(fast, call), generate(fast, call, seeds=1)
        assert not torch.equal(first, other)
        assert torch.equal(generate(fast, call), first)
        assert torch.equal(generate(accelerate(pipeline, [self.accelerator]), call, seeds=1), other)

    def test_another_size_between_two_calls_leaves_no_trace(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        first = generate(fast, call)
        assert torch.isfinite(generate(fast, call, height=96, width=32)).all()
        assert torch.equal(generate(fast, call), first)

    def test_after_an_error_at_any_step_the_next_call_is_a_fresh_one_s_and_nothing_is_held(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        expected = generate(fast, call)
        for last in (0, STEPS // 2, STEPS - 1):

            def stop(_pipeline: object, step: int, _timestep: object, values: Call, last: int = last) -> Call:
                if step == last:
                    raise KeyboardInterrupt
                return values

            with Made() as made, suppress(KeyboardInterrupt):
                generate(fast, call, callback_on_step_end=stop)
                raise AssertionError("the call was not stopped")
            assert made.alive() == 0
            assert not fast.fastdit.last_run.completed
            assert torch.equal(generate(fast, call), expected)

    def test_guidance_branches_do_not_share_state(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        alone = generate(fast, call)
        actions = [step.action for step in fast.fastdit.last_run.steps]
        same = {f"negative_{name}": call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        both = generate(fast, call, **same, true_cfg_scale=2.0)
        # With the same prompt on both sides guidance does nothing, so every branch must act as the lone one did.
        assert torch.equal(both, alone)
        steps = fast.fastdit.last_run.steps
        for branch in {step.branch for step in steps}:
            assert [step.action for step in steps if step.branch == branch] == actions

    def test_counters_equal_the_real_block_calls(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        generate(fast, call)  # a twin's first forward is observed
        with counted_calls(pipeline.transformer) as counts:
            generate(fast, call)
        record = fast.fastdit.last_run
        if Change.BATCH_ROWS not in self.accelerator.effects.changes and self.accelerator.level != Level.TOKEN_CACHE:
            assert sum(step.blocks_run for step in record.steps) == sum(counts)

    def test_a_signal_that_is_not_finite_means_compute_and_is_said_once(self) -> None:
        if not self.reads_signal:
            return
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        shape = generate(fast, call).shape
        for value in (math.nan, math.inf):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(fast, call, latents=torch.full(shape, value))
            record = fast.fastdit.last_run
            assert record.skipped == 0 and record.doubts > 0
            assert sum(type(warning.message) is FastditWarning for warning in caught) == 1

    def test_a_stack_with_it_survives_json(self) -> None:
        stack = Stack([self.accelerator])
        assert Stack.from_json(stack.to_json()) == stack

    def test_the_batch_rule_is_as_declared(self) -> None:
        if not isinstance(self.accelerator, StepCache) or Break.BATCH_INVARIANCE in self.accelerator.effects.breaks:
            return
        pipeline, call = self.pipeline(batch=3)
        fast = accelerate(pipeline, [self.accelerator])
        together = generate(fast, call, seeds=(5, 6, 7))
        for index, seed in enumerate((5, 6, 7)):
            own = {name: call[name][index : index + 1] for name in ("prompt_embeds", "pooled_prompt_embeds")}
            alone = generate(fast, {**call, **own}, seeds=seed)
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-4)

    def test_a_second_call_compiles_nothing(self) -> None:
        from torch._dynamo.utils import counters

        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.accelerator])
        generate(fast, call)
        before = {name: dict(values) for name, values in counters.items()}
        generate(fast, call)
        assert {name: dict(values) for name, values in counters.items()} == before


class Made(TorchDispatchMode):
    """Notes every tensor of three dimensions and more that is made while it is open: latents, features, pictures.

    It holds none of them, so what is still `alive` afterwards is held by somebody else.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        operator: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = operator(*args, **(kwargs or {}))
        given = {id(tensor) for tensor in tensors_of((args, kwargs))}
        # An operator in place gives what it was given.
        made = [tensor for tensor in tensors_of(found) if tensor.dim() >= 3 and id(tensor) not in given]
        self._made += [weakref.ref(tensor) for tensor in made]
        return found

    def alive(self) -> int:
        """Count the tensors that somebody holds, and not only a cycle of the interrupted call's own."""
        if any(tensor() is not None for tensor in self._made):
            gc.collect()
        return sum(tensor() is not None for tensor in self._made)
