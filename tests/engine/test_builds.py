"""What a build may touch: nothing of the user's, one at a time, what it used and what it leaves."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pieces
import pytest
import torch
from pieces import Written
from torch import nn

from fastdit import Compile, EngineWarning, NeverFired, accelerate
from fastdit.engine import packaged
from fastdit.engine.inductor import forget_other_builds
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.scratch import scratch
from fastdit.engine.sealed import manifest_of, seal


class Counting(pieces.Block):
    """A block that counts its calls, in a number and in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        self.counted += 1
        return super().forward(hidden_states, scale)


@dataclasses.dataclass(frozen=True)
class Rough(Written):
    """Does to the module what exporters do: puts other tensors in the place of weights, runs it, adds to it."""

    def build(self, call: PieceCall, folder: Path) -> Execute:
        call.run()
        for part in call.module.modules():
            for place in (part._parameters, part._buffers):
                place |= {name: tensor.to("meta") for name, tensor in place.items() if tensor is not None}
            part.register_buffer("added", None)
            part.added_too = True
        call.module.linear = nn.Identity()
        return super().build(call, folder)


def test_whatever_a_build_does_to_a_block_the_user_s_own_stays_as_it_is(tmp_path: Path) -> None:
    module = pieces.model()
    module.blocks = nn.ModuleList(Counting(8).eval() for _ in range(2))
    held = {name: (dict(vars(part)), dict(part._parameters)) for name, part in module.named_modules()}
    twin = accelerate(module, [Rough(directory=str(tmp_path))])
    pieces.run(twin, pieces.inputs())
    assert [(block.calls, float(block.counted)) for block in module.blocks] == [(1, 1.0), (1, 1.0)]
    for name, part in module.named_modules():
        attributes, weights = held[name]
        assert vars(part).keys() == attributes.keys()
        assert all(part._parameters[key] is weight for key, weight in weights.items())


@dataclasses.dataclass(frozen=True)
class Slow(Written):
    """Takes its time, and tells of every build when it began and when it was done."""

    told: ClassVar[list[str]] = []

    def build(self, call: PieceCall, folder: Path) -> Execute:
        self.told.append("began")
        time.sleep(0.05)
        self.told.append("done")
        return super().build(call, folder)


def in_threads(count: int, act: Callable[[int], object]) -> list[Exception]:
    """Do something in several threads, and give what was raised."""
    raised: list[Exception] = []

    def run(number: int) -> None:
        try:
            act(number)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("kinds", [1, 4])
def test_cold_twins_in_several_threads_build_one_after_the_other_and_each_kind_once(kinds: int, tmp_path: Path) -> None:
    Slow.told.clear()
    modules = [pieces.model() for _ in range(4)]
    for number, module in enumerate(modules):
        for block in module.blocks:
            block.gain = float(number % kinds)
    twins = [accelerate(module, [Slow(directory=str(tmp_path))]) for module in modules]
    assert in_threads(4, lambda number: pieces.run(twins[number], pieces.inputs())) == []
    assert Slow.told == ["began", "done"] * kinds


@dataclasses.dataclass(frozen=True)
class Recompiling(Written):
    """What it keeps is of no use to a compiler that is `new` and misses its graph, which it makes then."""

    new: ClassVar[bool] = False

    def build(self, call: PieceCall, folder: Path) -> Execute:
        execute = super().build(call, folder)
        if self.new and not (folder / "graph").exists():
            (folder / "graph").touch()
        return execute


def test_an_entry_that_the_compiler_made_nothing_of_is_not_called_kept_and_is_repaired(tmp_path: Path) -> None:
    told, said = [], []
    for new in (False, True, True):
        Recompiling.new = new
        twin = accelerate(pieces.model(), [Recompiling(directory=str(tmp_path))])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            pieces.run(twin, pieces.inputs())
        told += [build.kept for build in twin.fastdit.workshop.builds]
        said += [str(warning.message) for warning in heard]
        del twin
        gc.collect()
    assert told == [False, False, True]
    assert len(said) == 1 and "was compiled again" in said[0]


@pytest.mark.exhaustive
def test_what_inductor_can_t_use_of_an_entry_is_compiled_once_more_and_then_kept(tmp_path: Path) -> None:
    told: list[bool] = []

    def run() -> None:
        twin = accelerate(pieces.model(), [Compile(directory=str(tmp_path))])
        pieces.run(twin, pieces.inputs())
        told.extend(build.kept for build in twin.fastdit.workshop.builds)

    run()
    gc.collect()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for hollow in ("fxgraph", "aotautograd"):
        shutil.rmtree(folder / hollow, ignore_errors=True)
    seal(folder, manifest_of(folder)["key"])
    with pytest.warns(EngineWarning, match="was compiled again"):
        run()
    gc.collect()
    run()
    assert told == [False, False, True]


def test_what_a_twin_built_goes_with_the_last_twin_that_uses_it(tmp_path: Path) -> None:
    gc.collect()  # what other tests built is gone
    before = {*scratch().iterdir()}
    module = pieces.model()
    twins = [accelerate(module, [Written(directory=str(tmp_path))]) for _ in range(2)]
    for twin in twins:
        pieces.run(twin, pieces.inputs())
    assert len({*scratch().iterdir()} - before) == 1
    while twins:
        assert len({*scratch().iterdir()} - before) == 1
        twin = twins.pop()
        del twin
        gc.collect()
    assert {*scratch().iterdir()} == before


def test_weights_that_move_are_lent_by_the_tensor_that_lent_them_before_and_leave_no_gaps_among_them() -> None:
    weights = [torch.randn(4, 3).t(), torch.randn(7)[1:].view(2, 3)]
    with torch.inference_mode():
        lent = packaged._borrowed(weights[0], None)
    assert packaged._borrowed(weights[1], lent) is lent
    assert (lent.data_ptr(), lent.stride()) == (weights[1].data_ptr(), weights[1].stride())
    assert torch.equal(lent, weights[1])
    kept = weakref.ref(weights.pop().untyped_storage())
    assert kept() is None  # what was lent is not kept


def test_a_build_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    before = {*scratch().iterdir()}
    twin = accelerate(pieces.model(), [Written(fails=True, on_failure="eager", directory=str(tmp_path))])
    with pytest.warns(EngineWarning), pytest.warns(NeverFired):
        pieces.run(twin, pieces.inputs())
    assert {*scratch().iterdir()} == before


def test_what_was_found_of_a_processor_s_bfloat16_is_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    class Instructions:
        _is_bfloat16_supported = False

    found = Instructions()
    found._is_bfloat16_supported = True
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [found])
    forget_other_builds()
    assert not found._is_bfloat16_supported
