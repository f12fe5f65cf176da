"""What a run leaves behind: true, plain, light, and independent of what happens to the model later."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import tiny
from fastdit import FirstBlockCache, SkipPolicy, accelerate

CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))


def build() -> tiny.Built:
    return tiny.flux(size=128, steps=6)


def flops_of_a_plain_twin() -> int:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    return fast.fastdit.last_run.flops


def test_a_record_prints_as_a_table_of_its_steps() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    title, header, *rows = repr(fast.fastdit.last_run).splitlines()
    assert title.startswith("6 forwards in ") and title.endswith(": 2 computed, 0 partial, 4 skipped")
    assert header.split()[:6] == ["step", "stage", "sigma", "tokens", "ms", "blocks"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert " computed eager, cond, first steps" in rows[0] and " reused " in rows[1]
    assert max(map(len, rows)) < 100


@pytest.mark.parametrize("when", ["before the run", "after the run"])
def test_flops_are_counted_under_model_offload(when: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    if when == "before the run":
        pipe.enable_model_cpu_offload(device="cpu")
    tiny.run(fast, call)
    if when == "after the run":
        pipe.enable_model_cpu_offload(device="cpu")
    assert fast.fastdit.last_run.flops == flops_of_a_plain_twin()
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"cpu"}


def test_flops_are_counted_under_group_offload() -> None:
    pipe, call = build()
    try:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        tiny.run(pipe, call)
    except AttributeError:
        pytest.skip("this version of diffusers can't offload groups without an accelerator")
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    assert fast.fastdit.last_run.flops == flops_of_a_plain_twin()


def test_counting_flops_calls_no_hook_of_the_user_s_and_draws_no_random_number() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    calls = []
    for module in (pipe.transformer, pipe.transformer.transformer_blocks[0], pipe.transformer.proj_out):
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    assert fast.fastdit.last_run.flops > 0
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_tells_of_its_own_run_whatever_the_model_becomes() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    pipe.load_lora_weights(tiny.lora(pipe.transformer), adapter_name="style")
    tiny.run(fast, call)
    assert fast.fastdit.last_run is not record
    assert record.flops == flops_of_a_plain_twin()
    assert fast.fastdit.last_run.flops > record.flops


def test_a_record_that_is_kept_does_not_keep_the_model() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    watched = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q.weight)
    del pipe, fast
    gc.collect()
    assert watched() is None
    assert len(record.steps) == 6


def test_hooks_of_the_user_s_on_the_transformer_are_called_once_a_forward() -> None:
    pipe, call = build()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append("before"))
    pipe.transformer.register_forward_hook(lambda *_: calls.append("after"))
    fast = accelerate(pipe, [CACHE])
    for _ in range(2):
        calls.clear()
        tiny.run(fast, call)
        assert calls == ["before", "after"] * 6


def test_a_hook_of_the_user_s_may_change_the_transformer_s_output() -> None:
    pipe, call = build()
    pipe.transformer.register_forward_hook(lambda module, args, output: (0.5 * output[0],))
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    assert torch.equal(tiny.run(accelerate(pipe, [FirstBlockCache(0.0)]), call), plain)


@pytest.mark.parametrize("stack", [[], [FirstBlockCache(0.0)], [CACHE]], ids=["empty", "neutral", "cache"])
def test_blocks_that_the_model_itself_leaves_out_are_not_counted_as_run(stack: list[Any]) -> None:
    pipe, call = tiny.sd3(steps=6)
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    fast = accelerate(pipe, stack)
    tiny.run(fast, call, **options)
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call, **options)
    assert sum(step.blocks_run for step in fast.fastdit.last_run.steps) == sum(counts)


def test_calls_that_a_pipeline_does_not_name_are_branches_of_their_own() -> None:
    pipe, call = tiny.sd3(steps=6)
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    fast = accelerate(pipe, [FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=0))])
    tiny.run(fast, call, **options)
    tiny.run(fast, call, **options)
    ran: dict[str, list[bool]] = {}
    for step in fast.fastdit.last_run.steps:
        ran.setdefault(step.branch, []).append(step.action == "computed")
    # The guided call runs in every step, the one without the layers from the second on.
    assert list(ran.values()) == [[True, *[False] * 5], [True, *[False] * 4]]


def test_seconds_are_positive_and_sum_to_less_than_the_call() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert all(step.seconds > 0 for step in record.steps)
    assert sum(step.seconds for step in record.steps) <= record.seconds


def test_every_step_says_why() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [FirstBlockCache(0.9)])
    tiny.run(fast, call)
    assert all(isinstance(step.reason, str) and step.reason for step in fast.fastdit.last_run.steps)


def test_a_failed_call_leaves_the_record_of_what_it_did() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        tiny.run(fast, call, callback_on_step_end=callback)
    record = fast.fastdit.last_run
    assert not record.completed
    assert [step.step for step in record.steps] == [0, 1, 2]
    assert record.flops > 0
