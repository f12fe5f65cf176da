"""Captures of blocks: arguments go where they are read, outputs have memory of their own, moved weights are seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pieces
import pytest
import torch

from fastdit import (
    Compile,
    InvalidConfig,
    UnsupportedModel,
    accelerate,
)
from fastdit.engine.captured import Captures
from fastdit.engine.piece import PieceCall
from fastdit.nested import map_tensors
from fastdit.testing import EngineContract, generate


def rerun(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Do on a CPU what a graph does: write the same output anew from whatever is where it was read."""
    output = run()
    return output, lambda: output.copy_(run())


@torch.no_grad()
def test_every_call_reads_its_own_arguments_and_keeps_its_own_output() -> None:
    block, captures = pieces.Block(4), Captures(PieceCall.run, rerun)
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = [captures(PieceCall(block, (given,), {"scale": 2.0})) for given in (first, second)]
    assert torch.equal(found[0], block(first, scale=2.0))
    assert torch.equal(found[1], block(second, scale=2.0))


@torch.no_grad()
def test_blocks_that_share_an_engine_have_captures_of_their_own() -> None:
    one, other, given = pieces.Block(4), pieces.Block(4), torch.randn(2, 3, 4)
    captures = Captures(PieceCall.run, rerun)
    assert torch.equal(captures(PieceCall(one, (given,))), one(given))
    assert torch.equal(captures(PieceCall(other, (given,))), other(given))


@torch.no_grad()
def test_a_weight_that_moved_is_captured_again_and_one_changed_in_place_is_not() -> None:
    captured: list[int] = []

    def counted(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        captured.append(1)
        return rerun(run, device)

    block, given, captures = pieces.Block(4), torch.randn(2, 3, 4), Captures(PieceCall.run, counted)
    captures(PieceCall(block, (given,)))
    block.linear.weight += 1.0
    assert torch.equal(captures(PieceCall(block, (given,))), block(given))
    assert len(captured) == 1
    before = block.linear.weight.data  # held, so that its memory is not given out again
    block.linear.weight.data = before + 1.0
    assert torch.equal(captures(PieceCall(block, (given,))), block(given))
    assert len(captured) == 2


@torch.no_grad()
def test_a_capture_is_forgotten_with_its_block() -> None:
    def frozen(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        return map_tensors(run(), torch.clone), lambda: None  # holds nothing of what it ran, as a graph does

    block, captures = pieces.Block(4), Captures(PieceCall.run, frozen)
    captures(PieceCall(block, (torch.randn(2, 3, 4),)))
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


def test_a_model_that_is_not_on_a_cuda_device_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"captures .* is on cpu; move it there first"):
        accelerate(pieces.model(), [Compile(cuda_graphs=True, directory=str(tmp_path))])


def test_graphs_of_several_shapes_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="one shape"):
        Compile(cuda_graphs=True, tokens=(16, 64))
    with pytest.raises(InvalidConfig, match="True or False"):
        Compile(cuda_graphs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a CUDA device")
def test_on_a_gpu_a_captured_run_equals_an_eager_one_and_a_second_call_repeats_it(tmp_path: Path) -> None:
    pipeline, call = EngineContract().pipeline()
    pipeline.to("cuda")
    call = {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    expected = generate(pipeline, call)
    fast = accelerate(pipeline, [Compile(cuda_graphs=True, directory=str(tmp_path))])
    found = generate(fast, call)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(generate(fast, call), found)
