"""What diffusers does to a loaded model (offloading, LoRA, casting, quantised weights) under every engine.

Each either works, and gives what the model itself gives, or is refused by a named error before a block has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fastdit import (
    AOT,
    Compile,
    EngineBuildFailed,
    EngineWarning,
    NeverFired,
    accelerate,
)
from fastdit.engine.checksum import weights_of
from fastdit.engine.fingerprint import structure_of
from fastdit.testing import flux_transformer, generate, tiny_flux

hf_accelerate = pytest.importorskip("accelerate")

TOLERANCE = 1e-5
CPU = torch.device("cpu")


def openvino(**options: Any) -> Any:
    pytest.importorskip("openvino")
    return pytest.importorskip("fastdit_openvino").OpenVINO(**options)


ENGINES: dict[str, Callable[..., Any]] = {
    "Compile": Compile,
    "Compile, packed": lambda **options: Compile(packed=True, **options),
    "AOT": AOT,
    "OpenVINO": openvino,
}

EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES)
ONE_ENGINE_FIRST = pytest.mark.parametrize(
    "engine", ["Compile", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ENGINES if name != "Compile")]
)


def build() -> tiny.Built:
    """FLUX of one single block, which has all that a double block has of linear layers: one engine to build."""
    pipeline, call = tiny_flux(steps=2)
    pipeline.transformer = flux_transformer(layers=0, single_layers=1)
    return pipeline, call


def agrees(fast: Any, call: tiny.Kwargs, expected: Tensor) -> bool:
    """Whether a twin gives what is expected, with every block run by the engine."""
    found = generate(fast, call)
    names = {step.engine for step in fast.fastdit.last_run.steps}
    assert names == {type(fast.fastdit.stack.engine).__name__}
    return float((found - expected).norm() / expected.norm()) <= TOLERANCE


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of its own: a swap of larger matrices exchanges memory with what it was given."""
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.exhaustive
@EVERY_ENGINE
def test_model_offload_works(engine: str) -> None:
    pipeline, call = build()
    expected = generate(pipeline, call)
    pipeline.enable_model_cpu_offload(device="cpu")
    fast = accelerate(pipeline, [ENGINES[engine]()])
    assert agrees(fast, call, expected) and agrees(fast, call, expected)


def sequentially(pipeline: Any) -> None:
    for block in pipeline.transformer.single_transformer_blocks:
        hf_accelerate.cpu_offload(block, execution_device=CPU)


def by_groups(level: str) -> Callable[[Any], None]:
    def offload(pipeline: Any) -> None:
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        try:
            pipeline.transformer.enable_group_offload(
                onload_device=CPU, offload_device=CPU, offload_type=level, **options
            )
        except AttributeError:
            pytest.skip("this version of diffusers can't offload groups without an accelerator")

    return offload


def layer_by_layer(pipeline: Any) -> None:
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


INSIDE: dict[str, Callable[[Any], None]] = {
    "sequential offload": sequentially,
    "group offload of blocks": by_groups("block_level"),
    "group offload of leaves": by_groups("leaf_level"),
    "layerwise casting": layer_by_layer,
}


@ONE_ENGINE_FIRST
@pytest.mark.parametrize("what", INSIDE)
def test_what_acts_inside_a_block_is_refused_by_name_before_anything_is_built(engine: str, what: str) -> None:
    pipeline, call = build()
    fast = accelerate(pipeline, [ENGINES[engine]()])
    INSIDE[what](pipeline)
    with pytest.raises(EngineBuildFailed, match=r"single_transformer_blocks\.0.* a hook or a forward of its own"):
        generate(fast, call)
    assert fast.fastdit.workshop.builds == []


@ONE_ENGINE_FIRST
@pytest.mark.parametrize("what", sorted(set(INSIDE) - {"sequential offload"}))
def test_what_acts_inside_a_block_runs_eagerly_where_that_was_asked_for(engine: str, what: str) -> None:
    pipeline, call = build()
    INSIDE[what](pipeline)
    fast = accelerate(pipeline, [ENGINES[engine](on_failure="eager")])
    expected = generate(pipeline, call)
    with pytest.warns(EngineWarning, match="runs eagerly"), pytest.warns(NeverFired, match="ran eagerly"):
        found = generate(fast, call)
    assert torch.equal(found, expected)
    assert {step.engine for step in fast.fastdit.last_run.steps} == {"eager"}


@pytest.mark.exhaustive
@EVERY_ENGINE
def test_a_lora_that_is_loaded_scaled_fused_and_unloaded_is_seen(engine: str) -> None:
    pipeline, call = build()
    fast = accelerate(pipeline, [ENGINES[engine]()])
    outputs = []

    def seen() -> bool:
        outputs.append(generate(pipeline, call))
        return agrees(fast, call, outputs[-1])

    pipeline.load_lora_weights(tiny.lora(pipeline.transformer), adapter_name="style")
    assert seen()
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    assert seen()
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


@pytest.mark.exhaustive
@EVERY_ENGINE
def test_a_lora_that_is_swapped_gives_the_swapped_model_s_picture(engine: str) -> None:
    pipeline, call = build()
    fast = accelerate(pipeline, [ENGINES[engine]()])
    pipeline.transformer.enable_lora_hotswap(target_rank=4)
    states = [tiny.lora(pipeline.transformer, seed=seed, rank=rank) for seed, rank in ((0, 2), (1, 4), (2, 3))]
    outputs = []
    for number, state in enumerate(states):
        pipeline.load_lora_weights(clones(state), adapter_name="style", hotswap=number > 0)
        outputs.append(generate(pipeline, call))
        assert agrees(fast, call, outputs[-1]), number
    assert all(not torch.allclose(one, outputs[0], atol=1e-2) for one in outputs[1:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["Compile", "AOT"])
def test_a_swap_of_padded_loras_builds_and_compiles_nothing(engine: str) -> None:
    from torch._dynamo.utils import counters

    pipeline, call = build()
    fast = accelerate(pipeline, [ENGINES[engine]()])
    pipeline.transformer.enable_lora_hotswap(target_rank=4)
    first, *others = [tiny.lora(pipeline.transformer, seed=rank, rank=rank) for rank in (2, 4, 3)]
    pipeline.load_lora_weights(first, adapter_name="style")
    generate(fast, call)
    built, graphs = len(fast.fastdit.workshop.builds), counters["stats"]["unique_graphs"]
    for state in others:
        pipeline.load_lora_weights(state, adapter_name="style", hotswap=True)
        assert agrees(fast, call, generate(pipeline, call))
    assert len(fast.fastdit.workshop.builds) == built
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_swap_that_changes_a_lora_s_strength_is_in_the_structure() -> None:
    pipeline, _ = build()
    pipeline.transformer.enable_lora_hotswap(target_rank=4)
    state = tiny.lora(pipeline.transformer)
    pipeline.load_lora_weights(clones(state), adapter_name="style")
    (block,) = pipeline.transformer.single_transformer_blocks
    before = structure_of(block)
    weaker = {name.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for name in state if "lora_A" in name}
    pipeline.load_lora_weights({**clones(state), **weaker}, adapter_name="style", hotswap=True)
    assert structure_of(block) != before


def quantised(seed: int = 0) -> Any:
    """FLUX with torchao's int8 weights."""
    quantization = pytest.importorskip("torchao.quantization")
    pipeline, call = build()
    pipeline.transformer = flux_transformer(layers=0, single_layers=1, seed=seed)
    quantization.quantize_(pipeline.transformer, quantization.Int8WeightOnlyConfig())
    return pipeline, call


@pytest.mark.exhaustive
@EVERY_ENGINE
def test_weights_that_torchao_quantised_work_or_are_refused_by_name(engine: str) -> None:
    pipeline, call = quantised()
    expected = generate(pipeline, call)
    fast = accelerate(pipeline, [ENGINES[engine]()])
    if engine in ("AOT", "Compile, packed"):
        with pytest.raises(EngineBuildFailed, match=r"weight .* is a .*Tensor.* (take Compile|leave `packed` out)"):
            generate(fast, call)
    else:
        assert agrees(fast, call, expected)


def test_a_packed_weight_s_values_and_their_layout_are_told_apart() -> None:
    first, second = (quantised(seed)[0].transformer.single_transformer_blocks[0] for seed in (0, 1))
    assert structure_of(first) == structure_of(second)
    assert weights_of(first) != weights_of(second)
    plain = build()[0].transformer.single_transformer_blocks[0]
    assert structure_of(first) != structure_of(plain)
