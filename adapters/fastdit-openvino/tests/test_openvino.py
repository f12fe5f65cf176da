"""OpenVINO engines keep the contract of every engine, compute in the precision asked for, and heal what was kept."""

from __future__ import annotations

import gc
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdit_openvino
from fastdit import (
    Interval,
    InvalidConfig,
    Stack,
    UnsupportedModel,
    accelerate,
)
from fastdit.engine.arguments import canonical, outline_text
from fastdit.engine.piece import PieceCall
from fastdit.engine.registry import Registry
from fastdit.errors import EngineBuildFailed, EngineMismatch, EngineWarning, NeverFired
from fastdit.testing import EngineContract, flux_transformer, generate, tiny_flux
from fastdit_openvino import OpenVINO


class TestContract(EngineContract):
    engine = staticmethod(OpenVINO)


def small(dtype: torch.dtype = torch.float32, seed: int = 0, single_layers: int = 1) -> tuple[Any, dict[str, Any]]:
    """Make a pipeline with one double block, two steps."""
    pipeline, call = tiny_flux(steps=2)
    pipeline.transformer = flux_transformer(layers=1, single_layers=single_layers, seed=seed)
    pipeline.transformer.to(dtype)
    return pipeline, {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_a_stack_with_it_is_read_where_nobody_has_imported_it() -> None:
    (entry,) = entry_points(group="fastdit.accelerators", name="OpenVINO")
    assert entry.load() is OpenVINO
    stack = Stack([Interval(2), OpenVINO(precision="bf16")])
    assert Stack.from_json(stack.to_json()) == stack


@pytest.mark.parametrize("precision", ["fp32", "", None, torch.float32])
def test_a_precision_that_is_none_is_refused_by_name(precision: Any) -> None:
    with pytest.raises(InvalidConfig, match="precision is one of 'f32', 'bf16'"):
        OpenVINO(precision=precision)


def test_a_model_off_the_cpu_is_refused_by_name() -> None:
    pipeline, _ = small()
    pipeline.transformer.to("meta")
    with pytest.raises(UnsupportedModel, match="runs on the CPU and the model is on meta"):
        accelerate(pipeline, [OpenVINO()])


def test_where_openvino_is_missing_accelerate_says_so_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, call = small()
    plain = generate(pipeline, call)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedModel, match=r"can't be imported .*; pip install openvino"):
        accelerate(pipeline, [OpenVINO()])
    assert torch.equal(generate(pipeline, call), plain)


def test_a_bfloat16_model_in_f32_is_nearer_to_float32_than_the_model_itself() -> None:
    exact = generate(*small())
    pipeline, call = small(torch.bfloat16)
    found = generate(accelerate(pipeline, [OpenVINO()]), call)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact) <= 1.2 * relative_error(generate(pipeline, call), exact)


def test_bf16_is_computed_where_it_is_asked_for_and_nowhere_else() -> None:
    pipeline, call = small()
    plain = generate(pipeline, call)
    try:
        coarse = generate(accelerate(pipeline, [OpenVINO(precision="bf16")]), call)
    except EngineBuildFailed as error:
        pytest.skip(f"no bfloat16 here: {error}")
    assert relative_error(generate(accelerate(pipeline, [OpenVINO()]), call), plain) <= 1e-5
    assert 1e-4 < relative_error(coarse, plain) < 0.1


def test_under_a_cache_the_engine_runs_the_blocks_that_the_cache_lets_run() -> None:
    pipeline, call = small(single_layers=2)
    steps = {"num_inference_steps": 6}
    fast, eager = (accelerate(pipeline, stack) for stack in ([Interval(3), OpenVINO()], [Interval(3)]))
    assert relative_error(generate(fast, call, **steps), generate(eager, call, **steps)) <= 1e-5
    records = [twin.fastdit.last_run for twin in (fast, eager)]
    assert records[0].skipped == records[1].skipped > 0
    assert {step.engine for step in records[0].steps if step.blocks_run} == {"OpenVINO"}


def test_what_was_kept_is_loaded_and_a_corrupt_blob_is_built_again(tmp_path: Path) -> None:
    pipeline, call = small()
    engine = OpenVINO(directory=str(tmp_path))

    def run() -> tuple[torch.Tensor, list[bool]]:
        gc.collect()  # engines live in the process as long as a twin holds them
        fast = accelerate(pipeline, [engine])
        return generate(fast, call), [build.kept for build in fast.fastdit.workshop.builds]

    first, kept = run()
    assert kept == [False, False] and len(Registry(tmp_path).entries()) == 2
    again, kept = run()
    assert kept == [True, True] and torch.equal(again, first)
    for blob in tmp_path.rglob("*.blob"):
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
    with pytest.warns(EngineWarning, match="has changed.*built again"):
        healed, kept = run()
    assert kept == [False, False] and torch.equal(healed, first)


def test_one_dynamic_engine_serves_every_stage_that_is_named_and_no_other() -> None:
    pipeline, call = small()
    fast = accelerate(pipeline, [OpenVINO(tokens=(25, 36))])
    for size in (80, 96, 64):  # 25, 36 and 16 tokens
        sides = {"height": size, "width": size}
        assert relative_error(generate(fast, call, **sides), generate(pipeline, call, **sides)) <= 1e-5
    engines = set(fast.fastdit.workshop._engines.values())
    assert len(engines) == 4  # two blocks: one for both stages, one for the size that was not named
    with torch.no_grad():
        for engine in engines:
            for tokens in (16, 25, 36, 49):
                piece = piece_of(pipeline, call, engine.key.piece, tokens)
                if tokens in ((16,) if "[1, 16, 32]" in outline_text(engine.key.arguments) else (25, 36)):
                    engine.execute(piece)
                else:
                    with pytest.raises(EngineMismatch, match=f"call has tensors of .* {tokens}, .*engine takes"):
                        engine.execute(piece)


def piece_of(pipeline: Any, call: dict[str, Any], kind: str, tokens: int) -> PieceCall:
    """Give the call of a block that the pipeline makes at a number of tokens."""
    (block,) = (block for block in pipeline.transformer.modules() if type(block).__name__ == kind)
    side, calls = 16 * int(tokens**0.5), []
    handle = block.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    generate(pipeline, call, height=side, width=side)
    handle.remove()
    return PieceCall(block, *calls[0], (side // 16, side // 16, "fine", "coarse")).mapped(canonical)


def test_a_dynamic_engine_that_is_wrong_at_another_stage_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, call = small(seed=1)
    fast = accelerate(pipeline, [OpenVINO(tokens=(25, 36))])
    generate(fast, call, height=80, width=80)
    infer = fastdit_openvino._Request.infer
    monkeypatch.setattr(fastdit_openvino._Request, "infer", lambda *args: [1.001 * output for output in infer(*args)])
    with pytest.raises(EngineMismatch, match="differs from the module's own"):
        generate(fast, call, height=96, width=96)


class _Block(nn.Module):
    """A plain block, or one that does what an exporter can't follow."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.kind == "branch on a value" and float(hidden_states.sum()) > 0:
            return hidden_states
        return self.linear(hidden_states)


class _Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(kind), _Block(kind)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_a_block_that_can_t_be_converted_is_a_named_error_or_runs_eagerly_as_asked() -> None:
    model, hidden_states = _Model("branch on a value").eval(), torch.randn(1, 4, 8)
    with torch.no_grad():
        plain = model(hidden_states)
        fast = accelerate(model, [OpenVINO()])
        with fast.fastdit.run(1), pytest.raises(EngineBuildFailed, match=r"can't build blocks.0 \(_Block\)"):
            fast(hidden_states)
        fast = accelerate(model, [OpenVINO(on_failure="eager")])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with fast.fastdit.run(1):
                assert torch.equal(fast(hidden_states), plain)
    assert {one.category for one in said} == {EngineWarning, NeverFired}
    assert fast.fastdit.last_run.steps[0].engine == "eager"


def test_an_engine_that_gives_other_numbers_than_its_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = fastdit_openvino._Request.infer
    monkeypatch.setattr(fastdit_openvino._Request, "infer", lambda *args: [1.001 * output for output in infer(*args)])
    model = _Model("plain").eval()
    fast = accelerate(model, [OpenVINO()])
    with torch.no_grad(), fast.fastdit.run(1), pytest.raises(EngineBuildFailed, match="differs from the module's own"):
        fast(torch.randn(1, 4, 8))
