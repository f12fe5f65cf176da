"""What a run leaves behind: true, plain, light, and independent of what happens to the model later."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from fastdit import EasyCache, FirstBlockCache, Interval, SkipPolicy, accelerate

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


class Packed(nn.Linear):
    """A linear layer whose weight holds two values of four bits in a byte, as quantisers' do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        codes = (layer.weight.detach() * 8).round().clamp(-8, 7).to(torch.int8).add(8).to(torch.uint8)
        self.weight = nn.Parameter(codes[:, ::2] * 16 + codes[:, 1::2], requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            raise NotImplementedError("a kernel of its own, which runs on no meta tensors")
        halves = torch.stack([self.weight // 16, self.weight % 16], dim=2).flatten(1)
        return nn.functional.linear(x, (halves.to(x.dtype) - 8) / 8, self.bias)


def test_layers_of_a_quantiser_count_as_the_products_that_they_compute() -> None:
    pipe, call = build()
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        for name, part in list(block.named_modules()):
            if isinstance(part, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, Packed(part))
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    assert fast.fastdit.last_run.flops == flops_of_a_plain_twin()


class Reading(nn.Module):
    """Asks for a value, which there is none of where there are shapes alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states) if float(hidden_states.sum()) != 0.1 else hidden_states


@pytest.mark.parametrize("stack", [[], [CACHE], [EasyCache(1e6)]], ids=["empty", "cache", "whole forwards"])
def test_where_flops_can_t_be_counted_they_are_none_with_a_reason_and_nothing_raises(stack: list[Any]) -> None:
    pipe, call = build()
    pipe.transformer.x_embedder = Reading(pipe.transformer.x_embedder)
    fast = accelerate(pipe, stack)
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert record.flops is None and record.steps[0].full_flops is None
    assert record.flops_unknown.startswith("the FLOPs of FluxTransformer2DModel can't be counted")
    written = json.loads(json.dumps(record.to_json()))
    assert written["flops"] is None and written["flops_unknown"] == record.flops_unknown
    if stack == [CACHE]:
        with tiny.counted_blocks(pipe.transformer) as counts:
            tiny.run(fast, call)
        steps = fast.fastdit.last_run.steps
        assert sum(step.blocks_run for step in steps) == sum(counts)
        assert {step.blocks for step in steps} == {5}


@pytest.mark.parametrize(
    "name", ["HunyuanImagePipeline", "Lumina2Pipeline", "HiDreamImagePipeline", "ErnieImagePipeline"]
)
@pytest.mark.parametrize("stack", [[], [Interval(2, scope="forward")]], ids=["empty", "cache"])
def test_a_record_of_a_model_that_reads_its_inputs_is_written_all_the_same(name: str, stack: list[Any]) -> None:
    pipe, call = tiny.described(name, steps=4)
    fast = accelerate(pipe, stack)
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert json.loads(json.dumps(record.to_json()))["flops"] is record.flops is None
    assert record.flops_unknown and record.computed + record.skipped == len(record.steps)


def test_shapes_are_forgotten_with_the_records_that_have_them() -> None:
    pipe, call = build()
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [])
    (_, kwargs), *_ = calls
    kept = []
    for text in range(1, 30):
        changed = kwargs | {
            "encoder_hidden_states": kwargs["encoder_hidden_states"][:, :1].repeat(1, text, 1),
            "txt_ids": kwargs["txt_ids"][:1].repeat(text, 1),
        }
        with torch.no_grad(), twin.fastdit.run(num_inference_steps=1):
            twin(**changed)
        kept.append(weakref.ref(twin.fastdit.last_run.steps[0]._kind))
    assert [kind() is not None for kind in kept] == [False] * 28 + [True]
    assert twin.fastdit.last_run.flops > 0
