"""Modes, compilers, adapters and caches that a pipeline may already be used with."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook as DiffusersHook
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

import tiny
from fastdit import (
    RALU,
    EasyCache,
    FastditError,
    FirstBlockCache,
    IncompatibleStack,
    InvalidConfig,
    SkipPolicy,
    ToCa,
    accelerate,
)

CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
NEUTRAL = FirstBlockCache(0.0)
SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
SKIPPING = ["computed", "reused", "reused", "reused", "reused", "computed"]


def build(**changes: Any) -> tiny.Built:
    return tiny.flux(**{"size": 128, "steps": 6, **changes})


def actions(twin: Any) -> list[str]:
    return [step.action for step in twin.fastdit.last_run.steps]


def test_inference_mode_changes_nothing() -> None:
    pipe, call = build()
    plain, drawn = tiny.run(pipe, call), tiny.run(accelerate(pipe, [SHORT]), call)
    cached = tiny.run(accelerate(pipe, [CACHE]), call)
    with torch.inference_mode():
        assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
        assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
        assert torch.equal(tiny.run(accelerate(pipe, [SHORT]), call), drawn)
        assert torch.equal(tiny.run(accelerate(pipe, [CACHE]), call), cached)


def test_a_twin_used_in_inference_mode_works_outside_it_again() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [SHORT, CACHE])
    with torch.inference_mode():
        first = tiny.run(fast, call)
    assert torch.equal(tiny.run(fast, call), first)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_changes_nothing() -> None:
    pipe, call = build()
    with torch.autocast("cpu", torch.bfloat16):
        plain = tiny.run(pipe, call)
        assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
        assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
        assert torch.isfinite(tiny.run(accelerate(pipe, [SHORT]), call)).all()


def test_layerwise_casting_changes_nothing() -> None:
    pipe, call = build()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
    cached = accelerate(pipe, [CACHE])
    tiny.run(cached, call)
    assert actions(cached) == SKIPPING


@pytest.mark.exhaustive
def test_compiled_blocks_are_used_and_skipped() -> None:
    pipe, call = build()
    expected = tiny.run(accelerate(pipe, [CACHE]), call)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    try:
        plain = tiny.run(pipe, call)
    except torch._dynamo.exc.TorchDynamoException:
        pytest.skip("this version of diffusers can't be compiled by this version of torch")
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    cached = accelerate(pipe, [CACHE])
    torch.testing.assert_close(tiny.run(cached, call), expected, rtol=0, atol=1e-4)
    assert actions(cached) == SKIPPING


@pytest.mark.parametrize("stack", [[CACHE], [SHORT]], ids=["cache", "ralu"])
def test_a_transformer_compiled_as_a_whole_is_refused_by_name_and_never_bypassed(stack: list[Any]) -> None:
    pipe, call = build()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(FastditError, match="compile"):
        tiny.run(accelerate(pipe, stack), call)


def halving(module: Any) -> None:
    """Give a module object a forward of its own, which halves what the class's one gives."""
    own = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        return tuple(part * 0.5 for part in output) if isinstance(output, tuple) else output * 0.5

    module.forward = types.MethodType(forward, module)


def hooked_around(module: Any) -> None:
    halving(module)
    add_hook_to_module(module, ModelHook())


def hooked_within(module: Any) -> None:
    add_hook_to_module(module, ModelHook())
    halving(module)


def compiled(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def of_diffusers_around(module: Any) -> None:
    halving(module)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "own")


REPLACING = [halving, hooked_around, hooked_within, of_diffusers_around, compiled]
REPLACED = pytest.mark.parametrize("replace", REPLACING, ids=lambda replace: replace.__name__)


@pytest.mark.parametrize("replace", REPLACING[:-1], ids=lambda replace: replace.__name__)
@pytest.mark.parametrize("stack", [[], [EasyCache(0.0)]], ids=["empty", "neutral"])
def test_a_forward_that_was_put_on_the_object_acts_where_the_stack_is_around_it(replace: Any, stack: list[Any]) -> None:
    pipe, call = build()
    unpatched = tiny.run(pipe, call)
    replace(pipe.transformer)
    plain = tiny.run(pipe, call)
    assert not torch.equal(plain, unpatched)
    assert torch.equal(tiny.run(accelerate(pipe, stack), call), plain)


@REPLACED
@pytest.mark.parametrize("stack", [[NEUTRAL], [ToCa(2, 0.5, first=1)]], ids=["cache", "toca"])
def test_a_forward_that_was_put_on_the_object_is_refused_where_the_stack_acts_within_it(
    replace: Any, stack: list[Any]
) -> None:
    pipe, call = build()
    replace(pipe.transformer)
    with pytest.raises(IncompatibleStack, match=r"transformer \(FluxTransformer2DModel\) has a forward of its own"):
        tiny.run(accelerate(pipe, stack), call)


@pytest.mark.parametrize("where", ["around it", "within it"])
def test_a_forward_that_was_put_on_a_block_acts_or_is_refused_by_name(where: str) -> None:
    pipe, call = build()
    halving(pipe.transformer.single_transformer_blocks[1])
    plain = tiny.run(pipe, call)
    if where == "around it":
        assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
    else:
        with pytest.raises(IncompatibleStack, match=r"single_transformer_blocks\.1 .*has a forward of its own"):
            tiny.run(accelerate(pipe, [ToCa(2, 0.5, first=1)]), call)


def test_libraries_hooks_are_no_forward_of_the_user_s() -> None:
    pipe, call = build()
    plain = tiny.run(pipe, call)
    add_hook_to_module(pipe.transformer, ModelHook())
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(DiffusersHook(), "own")
    assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)


@pytest.mark.parametrize("stack", [[], [NEUTRAL], [SHORT]], ids=["empty", "cache", "ralu"])
def test_an_optimized_module_is_called_compiled_and_not_a_model_without_blocks(stack: list[Any]) -> None:
    pipe, _ = build()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(IncompatibleStack, match="compiled as a whole"):
        accelerate(pipe, stack)


@pytest.mark.parametrize("name", ["step", "set_timesteps"])
def test_a_method_that_was_put_on_the_scheduler_object_is_refused_by_name(name: str) -> None:
    """The run would not see it, and its clock would stand still."""
    pipe, call = build()
    method = getattr(pipe.scheduler, name)
    setattr(pipe.scheduler, name, types.MethodType(lambda self, *args, **given: method(*args, **given), pipe.scheduler))
    with pytest.raises(IncompatibleStack, match=f"FlowMatchEulerDiscreteScheduler has a {name} of its own"):
        tiny.run(accelerate(pipe, [CACHE]), call)


@pytest.mark.parametrize("stack", [[CACHE], [SHORT]], ids=["cache", "ralu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_of_diffusers_own_is_refused_by_name(stack: list[Any], when: str) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, call = build()
    if when == "after":
        fast = accelerate(pipe, stack)
        tiny.run(fast, call)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(IncompatibleStack, match="disable_cache"):
        tiny.run(accelerate(pipe, stack) if when == "before" else fast, call)
    pipe.transformer.disable_cache()
    again = accelerate(pipe, stack)
    assert torch.equal(tiny.run(again, call), tiny.run(accelerate(build()[0], stack), call))


def test_fused_projections_are_seen() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [NEUTRAL])
    tiny.run(fast, call)
    fast.transformer.fuse_qkv_projections()
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))


def test_an_attention_processor_set_through_the_twin_is_the_pipeline_s() -> None:
    calls = []

    class Counting(FluxAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    pipe, call = build()
    fast = accelerate(pipe, [])
    fast.transformer.set_attn_processor(Counting())
    tiny.run(fast, call)
    assert len(calls) == 6 * 5
    assert {type(processor) for processor in pipe.transformer.attn_processors.values()} == {Counting}


def test_weights_loaded_through_the_twin_are_the_pipeline_s() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    other, _ = build(seed=8)
    fast.transformer.load_state_dict(other.transformer.state_dict())
    assert torch.equal(tiny.run(fast, call), tiny.run(accelerate(other, [CACHE]), call))
    assert torch.equal(tiny.run(pipe, call), tiny.run(other, call))


def with_ip_adapter(pipe: Any) -> Any:
    """Give the double blocks an IP-Adapter with random weights; the keyword arguments that feed it."""
    transformer = pipe.transformer
    projection = ImageProjection(cross_attention_dim=32, image_embed_dim=8, num_image_text_embeds=2)
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    transformer.set_attn_processor(
        {
            name: processor
            if name.startswith("single")
            else FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(2,), scale=1.0)
            for name, processor in transformer.attn_processors.items()
        }
    )
    tiny.seed_weights(transformer, 3)
    embeds = [tiny.randn(1, 1, 8, seed=6)]
    return {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}


def test_an_ip_adapter_goes_with_caches_and_is_refused_by_the_schedule() -> None:
    pipe, call = build()
    call |= with_ip_adapter(pipe)
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    assert torch.equal(tiny.run(accelerate(pipe, [NEUTRAL]), call), plain)
    cached = accelerate(pipe, [CACHE])
    assert torch.isfinite(tiny.run(cached, call)).all()
    assert actions(cached) == SKIPPING
    with pytest.raises(InvalidConfig, match="ip_adapter_image_embeds"):
        tiny.run(accelerate(pipe, [SHORT]), call)


@pytest.mark.parametrize("stack", [[], [NEUTRAL], [CACHE], [SHORT]], ids=["empty", "neutral", "cache", "ralu"])
def test_attention_arguments_reach_the_blocks_and_the_user_s_dictionary_is_left_alone(stack: list[Any]) -> None:
    pipe, call = build()
    pipe.load_lora_weights(tiny.lora(pipe.transformer), adapter_name="style")
    fast = accelerate(pipe, stack)
    given = {"scale": 0.5}
    scaled = tiny.run(fast, call, joint_attention_kwargs=given)
    assert given == {"scale": 0.5}
    assert not torch.equal(scaled, tiny.run(fast, call))
    if stack in ([], [NEUTRAL]):
        assert torch.equal(scaled, tiny.run(pipe, call, joint_attention_kwargs={"scale": 0.5}))


@pytest.mark.parametrize("size", [130, 140])
def test_a_size_that_the_pipeline_rounds_down_is_rounded_down_by_the_twin(size: int) -> None:
    pipe, call = build()
    fast = accelerate(pipe, [SHORT])
    assert torch.equal(tiny.run(fast, call, height=size, width=size), tiny.run(fast, call))
