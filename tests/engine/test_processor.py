"""What engines compute in another way on a CPU: attention by heads where that won, and GELU by exp."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from fastdit import (
    AOT,
    Compile,
    InvalidConfig,
    accelerate,
)
from fastdit.blocks.attention import AttentionCall
from fastdit.engine import processor
from fastdit.engine.by_heads import attend_by_heads
from fastdit.engine.piece import PieceCall
from fastdit.testing import EngineContract, generate

OPERATOR = "fastdit::attention_by_heads"


@pytest.fixture(autouse=True)
def nothing_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_TIMED", {})


@pytest.fixture
def heads_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let heads be the faster way, whatever a clock says of attention this small."""

    def seconds(attend: Any, call: AttentionCall) -> float:
        assert attend(call).shape == call.query.shape
        return 0.1 if attend is attend_by_heads else 1.0

    monkeypatch.setattr(processor, "_seconds", seconds)


def called(fast: Any, call: dict[str, Any]) -> int:
    """Count the calls of the operator while a pipeline runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        generate(fast, call)
    return sum(event.count for event in profiler.key_averages() if event.key == OPERATOR)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [Compile, AOT])
def test_where_heads_win_they_are_compiled_in_and_the_choice_is_kept(
    engine: Any, tmp_path: Path, heads_win: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, call = EngineContract().pipeline()
    plain = generate(pipeline, call)
    for again in (False, True):
        if again:
            gc.collect()  # engines live as long as their twins
            monkeypatch.setattr(processor, "_TIMED", {})
            monkeypatch.setattr(processor, "_seconds", None)  # a second trial would fail
        fast = accelerate(pipeline, [engine(directory=str(tmp_path))])
        torch.testing.assert_close(generate(fast, call), plain, rtol=1e-5, atol=1e-5)
        assert {build.kept for build in fast.fastdit.workshop.builds} == {again}
        assert called(fast, call) == 2 * 3  # steps x blocks
        del fast


@pytest.mark.exhaustive
def test_with_heads_too_nothing_breaks_the_graph_and_nothing_is_compiled_after_a_warm_up(
    tmp_path: Path, heads_win: None
) -> None:
    from torch._dynamo.utils import counters

    contract = EngineContract()
    contract.engine = functools.partial(Compile, directory=str(tmp_path))  # type: ignore[misc]
    torch._dynamo.utils.counters.clear()
    contract.test_after_a_warm_up_nothing_is_built_or_compiled_for_other_prompts_seeds_guidance_and_sizes_seen()
    assert counters["stats"]["unique_graphs"] == 4  # kinds of blocks x sizes
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("engine", "kernel"), [(Compile(), "Attention _native_math"), (Compile(attention="torch"), ""), (AOT(), "Sage")]
)
def test_a_kernel_of_the_stack_or_torch_s_where_that_was_asked_for_goes_before_it(
    engine: Any, kernel: str, tmp_path: Path, heads_win: None
) -> None:
    class Attending(torch.nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    call = PieceCall(Attending(), (torch.randn(1, 2, 5, 4),), attention=kernel)
    expected = call.module(*call.args)
    with engine.tracing(call, tmp_path)():
        assert torch.equal(call.module(*call.args), expected)
    assert not list(tmp_path.iterdir())
    with Compile().tracing(dataclasses.replace(call, attention=""), tmp_path)(), profile() as profiler:
        torch.testing.assert_close(call.module(*call.args), expected)
    assert OPERATOR in {event.key for event in profiler.key_averages()}


def test_another_choice_for_attention_is_refused_by_name() -> None:
    for engine in (Compile, AOT):
        with pytest.raises(InvalidConfig, match=f"{engine.__name__}'s attention is one of 'fastest', 'torch'"):
            engine(attention="flash")


def test_the_clock_decides_by_a_tenth_and_once_for_a_shape() -> None:
    query = torch.randn(1, 2, 5, 4)
    call, waits = AttentionCall(query, query, query), []
    assert 0.0 < processor._seconds(lambda asked: waits.append(asked) or query, call) < 1.0  # type: ignore[func-returns-value]
    assert len(waits) == 1 + processor._REPEATS


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
def test_gelu_by_exp_is_gelu_by_tanh(values: list[float]) -> None:
    single = torch.tensor(values)
    expected = torch.nn.functional.gelu(single.double(), approximate="tanh")
    torch.testing.assert_close(processor._gelu(single).double(), expected, rtol=1e-5, atol=1e-6)
    assert processor._gelu(single.bfloat16()).dtype == torch.bfloat16


@pytest.mark.exhaustive
def test_a_kept_engine_is_found_from_another_folder_and_whatever_the_order_of_sets(tmp_path: Path) -> None:
    program = "import torch; from fastdit import Compile; print(Compile().environment(torch.device('cpu')))"
    found = set()
    for seed in ("1", "2"):
        (folder := tmp_path / seed).mkdir()
        own = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(folder)}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=own)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
