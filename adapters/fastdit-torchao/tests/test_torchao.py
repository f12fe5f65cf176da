"""Layers of few bits keep the contract of every accelerator, compute their formula, and go with all other levels."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdit import AOT, Compile, InvalidConfig, ProgressiveResolution, Stack, TeaCache, UnsupportedModel, accelerate
from fastdit.testing import AcceleratorContract, generate, tiny_flux
from fastdit_torchao import Quantize
from fastdit_torchao.copies import linear_layers
from fastdit_torchao.layers import EightBitLinear, bytes_of, quantised

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


class TestInt8(AcceleratorContract):
    accelerator = Quantize("int8")


class TestFp8(AcceleratorContract):
    accelerator = Quantize("fp8")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def layer_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_every_row_to_127_steps_of_its_largest_weight(dtype: torch.dtype) -> None:
    layer, hidden_states = layer_of(24, 32, dtype), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    made = quantised("int8", layer)
    with torch.no_grad():
        weight = layer.weight.float()
        step = weight.abs().amax(dim=1, keepdim=True) / 127.0
        assert float(((made.weight.float() - weight).abs() / step).max()) <= (0.52 if dtype is torch.float32 else 1.1)
        expected = hidden_states @ made.weight.float().T + layer.bias.float()
        found = made(hidden_states.to(dtype))
    assert relative_error(found, expected) < (1e-6 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_plan_says_the_bytes_that_a_layer_takes(precision: str) -> None:
    layer = layer_of(48, 64)
    made = quantised(precision, layer)
    assert sum(buffer.nbytes for buffer in made.buffers()) == bytes_of(precision, layer) < layer.weight.nbytes / 3
    pipeline, _ = tiny_flux(steps=2)
    full = sum(layer.weight.nbytes for layer in linear_layers(pipeline.transformer))
    said = accelerate(pipeline, [Quantize(precision)]).fastdit.explain(64, 64, 2)
    assert f"in {precision}, beside {full / 1e6:.1f} MB of the pipeline's own" in said


def test_outputs_are_near_the_plain_pipeline_s_which_stays_as_it_was() -> None:
    pipeline, call = tiny_flux(steps=4)
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    plain = generate(pipeline, call)
    found = generate(accelerate(pipeline, [Quantize("int8")]), call)
    assert 0.0 < relative_error(found, plain) < 0.02
    assert torch.equal(generate(pipeline, call), plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize("engine", [Compile, AOT], ids=["Compile", "AOT"])
def test_an_engine_a_cache_and_a_schedule_run_the_same_layers_of_few_bits(engine: Any, tmp_path: Path) -> None:
    pipeline, call = tiny_flux(steps=6)
    rest = [ProgressiveResolution(steps=(4, 4)), TeaCache(3.0, coefficients=(1.0, 0.0))]
    eager = accelerate(pipeline, [*rest, Quantize("int8")])
    expected = generate(eager, call)
    fast = accelerate(pipeline, [*rest, Quantize("int8"), engine(directory=str(tmp_path))])
    assert relative_error(generate(fast, call), expected) < 1e-4
    steps = fast.fastdit.last_run.steps
    assert {step.engine for step in steps if step.action == "computed"} == {engine.__name__}
    assert [step.action for step in steps] == [step.action for step in eager.fastdit.last_run.steps]
    assert any(step.action != "computed" for step in steps)


def test_openvino_runs_layers_of_few_bits(tmp_path: Path) -> None:
    openvino = pytest.importorskip("fastdit_openvino", reason="fastdit-openvino is not installed")
    pytest.importorskip("openvino", reason="openvino is not installed")
    pipeline, call = tiny_flux(steps=2)
    expected = generate(accelerate(pipeline, [Quantize("int8")]), call)
    fast = accelerate(pipeline, [Quantize("int8"), openvino.OpenVINO(directory=str(tmp_path))])
    assert relative_error(generate(fast, call), expected) < 1e-4


@pytest.mark.parametrize("how", ["in place", "by data", "another tensor"])
def test_weights_that_change_are_quantised_anew(how: str) -> None:
    pipeline, call = tiny_flux(steps=2)
    twin = accelerate(pipeline, [Quantize("int8")])
    before = generate(twin, call)
    layer = linear_layers(pipeline.transformer)[3]
    with torch.no_grad():
        if how == "in place":
            layer.weight.mul_(1.5)
        elif how == "by data":
            layer.weight.data *= 1.5
        else:
            layer.weight = nn.Parameter(layer.weight * 1.5)
    after = generate(twin, call)
    assert not torch.equal(after, before)
    assert torch.equal(after, generate(accelerate(pipeline, [Quantize("int8")]), call))


def test_a_lora_is_seen_and_adds_to_the_layer_of_few_bits() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pipeline, call = tiny_flux(steps=2)
    twin = accelerate(pipeline, [Quantize("int8")])
    before, plain = generate(twin, call), generate(pipeline, call)
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with_lora, plain_with_lora = generate(twin, call), generate(pipeline, call)
    assert relative_error(with_lora, plain_with_lora) < 0.02 < relative_error(plain_with_lora, plain)
    pipeline.transformer.disable_adapters()
    assert torch.equal(generate(twin, call), before)


def test_memory_that_is_handed_over_is_free_after_the_first_run() -> None:
    pipeline, call = tiny_flux(steps=2)
    expected = generate(accelerate(pipeline, [Quantize("int8")]), call)
    weights = [weakref.ref(layer.weight) for layer in linear_layers(pipeline.transformer)]
    twin = accelerate(pipeline, [Quantize("int8", hand_over=True)])
    assert "in the place of" in twin.fastdit.explain(64, 64, 2)
    assert torch.equal(generate(twin, call), expected) and torch.equal(generate(twin, call), expected)
    gc.collect()
    assert not any(weight() for weight in weights)
    assert torch.equal(generate(pipeline, call), expected)
    with pytest.raises(UnsupportedModel, match="quantised already"):
        accelerate(pipeline, [Quantize("int8")])


def test_hooks_on_blocks_run_and_those_that_a_copy_would_leave_out_are_refused_by_name() -> None:
    pipeline, call = tiny_flux(steps=2)
    twin, seen = accelerate(pipeline, [Quantize("int8")]), []
    handle = pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    generate(twin, call)
    assert len(seen) == 2
    handle.remove()
    layer = linear_layers(pipeline.transformer)[0]
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match=r"transformer_blocks\.0\..* has a hook"):
        generate(twin, call)
    with pytest.raises(UnsupportedModel, match="leave Quantize out"):
        accelerate(pipeline, [Quantize("int8")])


def test_a_precision_that_the_device_can_t_compute_in_is_refused_by_name() -> None:
    pipeline, _ = tiny_flux(steps=2)
    with pytest.raises(UnsupportedModel, match=r"Quantize\(precision='int4'\) can't compute in torch.float32 on cpu"):
        accelerate(pipeline, [Quantize("int4")])
    with pytest.raises(InvalidConfig, match="precision is one of 'int8', 'fp8', 'int4'"):
        Quantize("int2")  # type: ignore[arg-type]


def test_a_twin_s_copies_go_with_it_and_leave_the_pipeline_alive_no_longer_than_the_user_does() -> None:
    pipeline, call = tiny_flux(steps=2)
    twin = accelerate(pipeline, [Quantize("int8")])
    generate(twin, call)
    (copies,) = (kept for _, kept in twin.fastdit._lasting)
    layer = next(part for part in copies.twin_of(pipeline.transformer).modules() if isinstance(part, EightBitLinear))
    gone = weakref.ref(layer), weakref.ref(pipeline.transformer)
    del twin, copies, layer, pipeline
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_stack_with_it_survives_json() -> None:
    stack = Stack([Quantize("fp8", hand_over=True), TeaCache(0.25)])
    assert Stack.from_json(stack.to_json()) == stack
    assert [one.level.value for one in stack] == ["weights", "step cache"]
