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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.acceleration import accelerate
from fastdit.accelerator import (
    Accelerator,
    Break,
    Change,
    Level,
)
from fastdit.engine.arguments import canonical, mapped
from fastdit.engine.base import BuiltEngine, Engine, PieceCall
from fastdit.engine.workshop import Workshop
from fastdit.errors import EngineMismatch, FastditWarning
from fastdit.nested import tensors_of
from fastdit.stack import Stack
from fastdit.step_cache.base import StepCache

STEPS = 12
_Call = dict[str, Any]


def seed_weights(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Give every parameter a seeded value under which no part of the model is degenerate.

    Matrices keep the variance of their input (times `gain`), norms stay near one, biases and tables are visible: each
    block changes its input noticeably, and differently at each noise level.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "scale_shift_table" in name:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif name.endswith(("weight", "gamma")):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def flux_transformer(
    *, guidance: bool = True, seed: int = 0, layers: int = 2, single_layers: int = 3, gain: float = 1.0
) -> Any:
    """Make a FLUX transformer with double and single blocks, two heads of 16."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    seed_weights(model, seed, gain)
    return model


def kl_autoencoder(*, latent_channels: int = 4, levels: int = 4, seed: int = 1, gain: float = 1.0) -> Any:
    """Make an AutoencoderKL that shrinks each side by 2 ** (levels - 1); its pictures span black to white."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()
    seed_weights(vae, seed, gain)
    return vae


def tiny_flux(*, steps: int = STEPS, batch: int = 1, size: int = 64) -> tuple[Any, _Call]:
    """Make a FluxPipeline without text encoders and the keyword arguments of one call; 16 pixels are a token."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_autoencoder(),
        transformer=flux_transformer(),
        **absent,
    )
    pipeline.set_progress_bar_config(disable=True)
    # Identifies the weights to accelerators that look for numbers measured on them; there are none.
    pipeline.transformer.register_to_config(_name_or_path="tiny-flux")
    generator = torch.Generator().manual_seed(21)
    call = {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "output_type": "latent",
        "prompt_embeds": torch.randn(batch, 6, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=generator),
    }
    return pipeline, call


def generate(pipeline: Any, call: _Call, *, seeds: tuple[int, ...] | int = 0, **changes: Any) -> torch.Tensor:
    """Call a pipeline from seeds, one for the batch or one an image; give its latents."""
    each = [seeds] if isinstance(seeds, int) else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in each]
    images: torch.Tensor = pipeline(
        **{**call, **changes}, generator=generators[0] if isinstance(seeds, int) else generators
    ).images
    return images


@contextmanager
def counted_calls(transformer: nn.Module, blocks: Sequence[nn.Module] | None = None) -> Iterator[list[int]]:
    """Count the real calls of `blocks`, in order; without them of every block of the transformer's block lists."""
    if blocks is None:
        blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    counts = [0] * len(blocks)

    def counter(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    handles = [block.register_forward_pre_hook(counter(index)) for index, block in enumerate(blocks)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class AcceleratorContract:
    """What every accelerator promises. Subclass it with an accelerator that acts within 12 steps of `tiny_flux`.

    `reads_signal` says that a signal decides, so that one which is not finite must be noticed.
    """

    accelerator: ClassVar[Accelerator]
    neutral: ClassVar[Accelerator | None] = None
    reads_signal: ClassVar[bool] = False

    def pipeline(self, **options: Any) -> tuple[Any, _Call]:
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

            def stop(_pipeline: Any, step: int, _timestep: Any, values: _Call, last: int = last) -> _Call:
                if step == last:
                    raise KeyboardInterrupt
                return values

            gc.collect()
            before = _living()
            try:
                generate(fast, call, callback_on_step_end=stop)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the call was not stopped")
            gc.collect()
            assert _living() <= before
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


def _living() -> int:
    """Count the latents, features and pictures (tensors of three dimensions and more) that are alive."""
    # Asking by the type leaves deprecated objects of torch, which warn when they are touched, alone.
    return sum(issubclass(type(item), torch.Tensor) and item.dim() >= 3 for item in gc.get_objects())


class EngineContract:
    """What every engine promises. Subclass it with a constructor of the engine, as a `staticmethod`.

    The engines of a session should share one `directory` ($FASTDIT_CACHE), so that each is built once.
    """

    engine: ClassVar[Callable[..., Engine]]
    #: The largest error relative to the plain pipeline's latents, in float32.
    tolerance: ClassVar[float] = 1e-5

    def pipeline(self) -> tuple[Any, _Call]:
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

    def test_a_call_that_it_was_not_built_for_is_refused_by_name(self) -> None:
        engine, piece = self._built()
        with torch.no_grad():
            self._refuse_wrong_calls(engine, piece)

    def _refuse_wrong_calls(self, engine: BuiltEngine, piece: PieceCall) -> None:
        right = engine(piece)
        hidden = piece.kwargs["hidden_states"]
        rope = piece.kwargs["image_rotary_emb"]

        def changed(**kwargs: Any) -> PieceCall:
            return replace(piece, kwargs={**piece.kwargs, **kwargs})

        wrong = {
            "shape": changed(hidden_states=hidden[:, :-1].contiguous()),
            "aspect at an equal token count": replace(piece, stage=(2, 8, *(piece.stage or (4, 4))[2:])),
            "stride": changed(hidden_states=hidden.transpose(1, 2).contiguous().transpose(1, 2)),
            "stride of one image": changed(hidden_states=hidden.as_strided(hidden.shape, (999, *hidden.stride()[1:]))),
            "dtype": changed(hidden_states=hidden.bfloat16()),
            "batch 2 after 1": changed(hidden_states=hidden.repeat(2, 1, 1), temb=piece.kwargs["temb"].repeat(2, 1)),
            "an argument less": changed(image_rotary_emb=None),
            "another nesting": changed(image_rotary_emb=list(rope)),
            "another module": replace(piece, module=self.pipeline()[0].transformer.single_transformer_blocks[0]),
        }
        assert [kind for kind, call in wrong.items() if not self._refused(engine, call)] == []
        for one, other in zip(tensors_of(engine(piece)), tensors_of(right), strict=True):
            assert torch.equal(one, other)

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

        def stop(*_: Any) -> _Call:
            raise KeyboardInterrupt

        try:
            generate(fast, call, callback_on_step_end=stop)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the call was not stopped")
        assert torch.equal(generate(fast, call), expected)

    def test_gradients_are_refused_by_name(self) -> None:
        engine, piece = self._built()
        with torch.enable_grad():
            assert self._refused(engine, piece)

    def test_a_stack_with_it_survives_json(self) -> None:
        stack = Stack([self.engine(on_failure="eager")])
        assert Stack.from_json(stack.to_json()) == stack

    def _refused(self, engine: BuiltEngine, call: PieceCall) -> bool:
        try:
            engine(call)
        except EngineMismatch:
            return True
        return False

    def _built(self) -> tuple[BuiltEngine, PieceCall]:
        """Build the engine of a double block by itself, as the pipeline's run would, and give it with its call."""
        pipeline, call = self.pipeline()
        block, calls = pipeline.transformer.transformer_blocks[0], []
        handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        generate(pipeline, call, num_inference_steps=1)
        handle.remove()
        args, kwargs = mapped(calls[0], canonical)
        piece = PieceCall(block, args, kwargs, (4, 4, "fine", "coarse"))
        workshop = Workshop(self.engine())
        with torch.no_grad():
            engine = workshop.get(piece, workshop.admit(block, "transformer_blocks.0"), "quick")
        assert engine is not None
        return engine, piece
