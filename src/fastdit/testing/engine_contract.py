"""The promises that every engine keeps, as a test class: one subclass an engine, for our tests and for adapters'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fastdit.acceleration import accelerate
from fastdit.engine.arguments import canonical
from fastdit.engine.base import Engine
from fastdit.engine.piece import PieceCall
from fastdit.errors import EngineMismatch
from fastdit.nested import tensors_of
from fastdit.stack import Stack
from fastdit.testing.models import tiny_flux
from fastdit.testing.tiny import Built, Call, counted_calls, flux_transformer, generate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EngineContract:
    """What every engine promises. Subclass it with a constructor of the engine, as a `staticmethod`.

    The engines of a session should share one `directory` ($FASTDIT_CACHE), so that each is built once.
    """

    engine: ClassVar[Callable[..., Engine]]
    #: The largest error relative to the plain pipeline's latents, in float32.
    tolerance: ClassVar[float] = 1e-5

    def pipeline(self) -> Built:
        """Make the pipeline and the arguments of a call: one double and two single blocks, two steps."""
        pipeline, call = tiny_flux(steps=2)
        pipeline.transformer = flux_transformer(layers=1, single_layers=2)
        return pipeline, call

    def test_every_block_runs_by_it_and_gives_the_plain_pipeline_s_numbers(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.engine()])
        found, plain = generate(fast, call), generate(pipeline, call)
        assert float((found - plain).norm() / plain.norm()) <= self.tolerance
        assert {step.engine for step in fast.fastdit.last_run.steps} == {type(self.engine()).__name__}
        assert not torch.equal(found, generate(fast, call, seeds=1))

    def test_after_a_warm_up_nothing_is_built_or_compiled_for_other_prompts_seeds_guidance_and_sizes_seen(self) -> None:
        from torch._dynamo.utils import counters

        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.engine()])
        embeds = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        for height, width in ((64, 64), (96, 32)):
            report = fast.fastdit.warmup(height, width, progress=False, **embeds)
            assert len(report.builds) == fast.fastdit.workshop.expected(pipeline.transformer)
        built, before = len(fast.fastdit.workshop.builds), {name: dict(values) for name, values in counters.items()}
        negative = {f"negative_{name}": value + 1 for name, value in embeds.items()}
        for height, width, changes in ((64, 64, {}), (96, 32, negative | {"true_cfg_scale": 2.0}), (64, 64, negative)):
            other = {name: value + 0.5 for name, value in embeds.items()}
            generate(fast, call, seeds=3, height=height, width=width, **other, **changes)
        assert len(fast.fastdit.workshop.builds) == built
        assert {name: dict(values) for name, values in counters.items()} == before

    def test_a_call_that_it_was_not_built_for_has_another_key(self) -> None:
        """Compiled code need not check what it is given, so it is the key that keeps calls apart."""
        pipeline, call = self.pipeline()
        block, engine = pipeline.transformer.transformer_blocks[0], self.engine()
        args, given = _first_call(pipeline, call, block)
        piece = PieceCall(block, args, given, (4, 4, "fine", "coarse")).mapped(canonical)
        hidden, rope = given["hidden_states"], given["image_rotary_emb"]

        def changed(**kwargs: object) -> PieceCall:
            return replace(piece, kwargs={**given, **kwargs})

        others = {
            "shape": changed(hidden_states=hidden[:, :-1]),
            "aspect at an equal token count": replace(piece, stage=(2, 8, "fine", "coarse")),
            "dtype": changed(hidden_states=hidden.bfloat16()),
            "batch 2 after 1": changed(hidden_states=hidden.repeat(2, 1, 1), temb=given["temb"].repeat(2, 1)),
            "an argument less": changed(image_rotary_emb=None),
            "another nesting": changed(image_rotary_emb=list(rope)),
            "another module": replace(piece, module=pipeline.transformer.single_transformer_blocks[0]),
        }
        with torch.no_grad():
            key = engine.key(piece)
            assert [kind for kind, other in others.items() if engine.key(other.mapped(canonical)) == key] == []

    def test_strides_are_made_canonical(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline.transformer, [self.engine()])
        _, given = _first_call(pipeline, call, pipeline.transformer)
        hidden = given["hidden_states"]
        odd = {
            "turned": hidden.transpose(1, 2).contiguous().transpose(1, 2),
            "of one image": hidden.as_strided(hidden.shape, (999, *hidden.stride()[1:])),
        }
        with torch.no_grad():
            plain = tensors_of(pipeline.transformer(**given))[0]
            for kind, values in odd.items():
                with fast.fastdit.run(1):
                    found = tensors_of(fast(**{**given, "hidden_states": values}))[0]
                assert float((found - plain).norm() / plain.norm()) <= self.tolerance, kind

    def test_weights_that_change_or_are_replaced_are_seen(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.engine()])
        before = generate(fast, call)
        block = pipeline.transformer.single_transformer_blocks[0]
        for change in ("in place", "replaced"):
            weight = block.proj_mlp.weight
            if change == "in place":
                weight.data += 0.3
            else:
                block.proj_mlp.weight = nn.Parameter(weight.detach() * 0.5)
            found, plain = generate(fast, call), generate(pipeline, call)
            assert float((found - plain).norm() / plain.norm()) <= self.tolerance
            assert not torch.allclose(found, before)
            before = found

    def test_hooks_on_a_block_run_as_ever(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.engine()])
        expected = generate(fast, call)
        with counted_calls(pipeline.transformer) as counts:
            assert torch.equal(generate(fast, call), expected)
        assert counts == [2] * len(counts)

    def test_the_plain_pipeline_stays_as_it_was(self) -> None:
        pipeline, call = self.pipeline()
        before, modules = generate(pipeline, call), dict(pipeline.transformer.named_modules())
        attributes = {name: set(vars(module)) for name, module in modules.items()}
        generate(accelerate(pipeline, [self.engine()]), call)
        assert dict(pipeline.transformer.named_modules()) == modules
        assert {name: set(vars(module)) for name, module in modules.items()} == attributes
        assert torch.equal(generate(pipeline, call), before)

    def test_after_an_error_the_next_call_is_a_fresh_one_s(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline, [self.engine()])
        expected = generate(fast, call)

        def stop(*_: object) -> Call:
            raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            generate(fast, call, callback_on_step_end=stop)
            raise AssertionError("the call was not stopped")
        assert torch.equal(generate(fast, call), expected)

    def test_gradients_are_refused_by_name(self) -> None:
        pipeline, call = self.pipeline()
        fast = accelerate(pipeline.transformer, [self.engine()])
        _, given = _first_call(pipeline, call, pipeline.transformer)
        with suppress(EngineMismatch), fast.fastdit.run(1), torch.enable_grad():
            fast(**given)
            raise AssertionError("gradients were not refused")

    def test_a_stack_with_it_survives_json(self) -> None:
        stack = Stack([self.engine(on_failure="eager")])
        assert Stack.from_json(stack.to_json()) == stack


def _first_call(pipeline: DiffusionPipeline, call: Call, module: nn.Module) -> tuple[tuple[object, ...], Call]:
    """Give the arguments of a module's first call in a pipeline's."""
    calls: list[tuple[tuple[object, ...], Call]] = []
    handle = module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    generate(pipeline, call, num_inference_steps=1)
    handle.remove()
    return calls[0]
