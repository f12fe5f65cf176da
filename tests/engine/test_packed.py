"""Linear layers with packed weights: equal to torch's, laid out once for all engines, and again after a change."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pieces
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastdit import (
    Compile,
    EngineBuildFailed,
    UnsupportedModel,
    accelerate,
)
from fastdit.engine import packed
from fastdit.engine.packed import packed_linear
from fastdit.testing import EngineContract, generate
from synthetic import FluxSize, random_call, random_flux

LAID_OUT, OPERATOR = "mkldnn::_reorder_linear_weight", "fastdit::packed_linear"


def counted(function: Any) -> dict[str, int]:
    """Count the operators that run in a function."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key: event.count for event in profiler.key_averages()}


BFLOAT16_HERE = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16_HERE, reason="oneDNN multiplies no bfloat16 on this processor")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer_of_any_number_of_tokens_and_strides(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        for tokens in (7, 1, 64):
            wide = torch.randn(2, 48, tokens, dtype=dtype)
            for values in (wide[:, :24].mT.contiguous(), wide[:, 5:29].mT):
                found = packed_linear(values, layer.weight, layer.bias)
                torch.testing.assert_close(found, layer(values), **tolerance)
                assert found.is_contiguous()


def test_a_weight_is_laid_out_once_and_again_when_it_changes_and_is_forgotten_with_it() -> None:
    layer, values = nn.Linear(24, 40), torch.randn(1, 5, 24)

    def run() -> None:
        with torch.no_grad():
            found = packed_linear(values, layer.weight, layer.bias)
            torch.testing.assert_close(found, layer(values), rtol=1e-5, atol=1e-5)

    def unseen_by_versions() -> None:
        layer.weight.data += 0.3

    def of_one_element() -> None:
        with torch.no_grad():
            layer.weight[3, 1] += 1.0

    def of_memory() -> None:
        layer.weight.data = layer.weight.detach() * 0.5

    def of_object() -> None:
        layer.weight = nn.Parameter(layer.weight.detach().clone())

    gc.collect()
    before = len(packed._PACKED)
    assert counted(run)[LAID_OUT] == 1
    for change in (unseen_by_versions, of_one_element, of_memory, of_object):
        change()
        assert counted(run)[LAID_OUT] == 1, change.__name__
        assert LAID_OUT not in counted(run), change.__name__
    assert len(packed._PACKED) == before + 1
    layer.weight = None
    gc.collect()
    assert len(packed._PACKED) == before


def test_its_operator_keeps_what_torch_asks_of_one() -> None:
    weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)
    operator = torch.ops.fastdit.packed_linear.default
    torch.library.opcheck(operator, (torch.randn(2, 3, 4), weight, torch.randn(6)))
    torch.library.opcheck(operator, (torch.randn(2, 3, 4), weight, None))


@pytest.mark.exhaustive
def test_all_engines_of_a_model_share_one_packed_form_of_each_weight() -> None:
    pipeline, call = EngineContract().pipeline()
    fast = accelerate(pipeline, [Compile(packed=True)])
    layers = [
        layer
        for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and "norm" not in name  # those of norms take a vector for each image
    ]
    first = counted(lambda: generate(fast, call))
    assert first[LAID_OUT] == len(layers)
    other = counted(lambda: generate(fast, call, height=96, width=32))
    assert LAID_OUT not in other and other[OPERATOR] >= 2 * len(layers)  # steps x layers


@needs_bfloat16
@pytest.mark.exhaustive
def test_it_is_as_near_to_exact_numbers_as_the_plain_model_in_bfloat16() -> None:
    pipeline = random_flux(FluxSize(double_blocks=1, single_blocks=1, heads=2, head_width=32), dtype=torch.bfloat16)
    call = {**random_call(pipeline, image_tokens_per_side=4, text_tokens=8), "num_inference_steps": 1}
    seen: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    generate(pipeline, call)
    hook.remove()
    module, arguments = pipeline.transformer.eval(), {**seen[0], "return_dict": False}
    floats = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    fast = accelerate(module, [Compile(packed=True)])
    with torch.no_grad(), fast.fastdit.run(1):
        exact = copy.deepcopy(module).float()(**floats)[0]
        plain, found = ((model(**arguments)[0].float() - exact).norm() for model in (module, fast))
    assert 0.0 < found <= 1.2 * plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_precision_is_refused_by_name(dtype: torch.dtype) -> None:
    fast = accelerate(pieces.model().to(dtype), [Compile(packed=True)])
    with pytest.raises(EngineBuildFailed, match=f"weight of linear is a Parameter of {dtype}"):
        pieces.run(fast, pieces.inputs().to(dtype))


def test_bfloat16_is_refused_by_name_on_a_processor_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    fast = accelerate(pieces.model().to(torch.bfloat16), [Compile(packed=True)])
    with pytest.raises(EngineBuildFailed, match="in bfloat16, which oneDNN does not multiply on this processor"):
        pieces.run(fast, pieces.inputs().to(torch.bfloat16))


def test_autocast_is_refused_by_name() -> None:
    fast = accelerate(pieces.model(), [Compile(packed=True)])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(EngineBuildFailed, match="autocast is on"):
        pieces.run(fast, pieces.inputs())


def test_another_device_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="for CPUs by oneDNN, and this is cuda; leave `packed` out"):
        packed.refuse_unpackable(pieces.model(), torch.device("cuda"))
    with pytest.raises(UnsupportedModel, match="this is cuda"):
        Compile(packed=True).check(None, OnCuda())
    Compile(packed=True).check(None, pieces.model())


class OnCuda(nn.Module):
    """What a check sees of a model on a GPU: a parameter, whose device is one."""

    def parameters(self, recurse: bool = True) -> Any:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            return iter([torch.empty(1, device="cuda")])
