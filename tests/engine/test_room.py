"""Room for engines: those of one session never push each other out, and what can't fit is never built."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from pieces import inputs, model, run
from torch import nn

from fastdit import InvalidConfig, ProgressiveResolution, accelerate
from fastdit.engine import room
from fastdit.engine.base import Engine
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.registry import Registry
from fastdit.errors import EngineBuildFailed, EngineWarning, NeverFired
from fastdit.testing import generate, tiny_flux

BUILT: list[str] = []


@dataclasses.dataclass(frozen=True)
class Baked(Engine):
    """Writes a block's weights down, as engines do that hold them, and notes every build."""

    bakes_weights: ClassVar[bool] = True
    reads_folder: ClassVar[bool] = False

    def build(self, call: PieceCall, folder: Path) -> Execute:
        if not (folder / "weights.pt").exists():
            BUILT.append(type(call.module).__name__)
            torch.save(call.module.state_dict(), folder / "weights.pt")
        return PieceCall.run


@pytest.fixture(autouse=True)
def nothing_built() -> None:
    BUILT.clear()


def distinct() -> nn.Module:
    """Three blocks of weights of their own."""
    made = model()
    for number, block in enumerate(made.blocks):
        nn.init.constant_(block.linear.weight, 0.1 + number)
    return made


def sizes(directory: Path) -> list[int]:
    return [entry.size for entry in Registry(directory).entries()]


def test_engines_in_use_never_push_each_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT_BYTES", 1)
    twin = accelerate(distinct(), [Baked(directory=str(tmp_path))])
    run(twin, inputs())
    assert len(BUILT) == 3 and len(sizes(tmp_path)) == 3
    run(accelerate(distinct(), [Baked(directory=str(tmp_path))]), inputs())
    assert len(BUILT) == 3


def test_what_nobody_uses_any_more_goes_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT_BYTES", 1)
    twin = accelerate(distinct(), [Baked(directory=str(tmp_path))])
    run(twin, inputs())
    del twin
    gc.collect()
    kept = accelerate(model(), [Baked(directory=str(tmp_path))])
    run(kept, inputs(tokens=5))
    assert len(sizes(tmp_path)) == 3  # those of the model that runs


def test_engines_that_a_model_will_want_are_kept_while_others_of_it_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = distinct()
    run(accelerate(own, [Baked(directory=str(tmp_path))]), inputs())
    gc.collect()
    small = min(sizes(tmp_path))
    shutil.rmtree(tmp_path / Registry(tmp_path).entries()[-1].digest)
    BUILT.clear()
    monkeypatch.setattr(room, "LIMIT_BYTES", 1)
    monkeypatch.setattr(Baked, "least_bytes", lambda self, module: small)
    run(accelerate(own, [Baked(directory=str(tmp_path))]), inputs())
    assert len(BUILT) == 1 and len(sizes(tmp_path)) == 3


@pytest.mark.parametrize("stages", [1, 2])
def test_a_limit_that_a_model_s_engines_exceed_is_refused_before_one_is_built(
    stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, call = tiny_flux(steps=6)
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    size = sum(tensor.nbytes for block in blocks for tensor in block.parameters())
    monkeypatch.setenv("FASTDIT_CACHE_LIMIT", str((stages * size - 1) / (1 << 30)))
    schedule = [ProgressiveResolution(steps=(3, 3))] if stages == 2 else []
    twin = accelerate(pipeline, [*schedule, Baked(directory=str(tmp_path))])
    said = rf"the {stages * len(blocks)} engines of FluxTransformer2DModel.* raise that limit \(FASTDIT_CACHE_LIMIT"
    with pytest.raises(EngineBuildFailed, match=said):
        generate(twin, call)
    assert BUILT == [] and sizes(tmp_path) == []


def test_an_engine_that_the_disk_has_no_room_for_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    twin = accelerate(distinct(), [Baked(directory=str(tmp_path))])
    with pytest.raises(EngineBuildFailed, match=r"lacking on the disk of .*make room there"):
        run(twin, inputs())
    assert BUILT == []
    eager = accelerate(distinct(), [Baked(on_failure="eager", directory=str(tmp_path))])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.warns(NeverFired), pytest.warns(EngineWarning, match="lacking on the disk"):
        run(eager, inputs())
    assert BUILT == []


def test_older_engines_make_room_on_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(accelerate(distinct(), [Baked(directory=str(tmp_path))]), inputs())
    gc.collect()
    disk = 4 * min(sizes(tmp_path))

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=disk - sum(sizes(tmp_path)))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    run(accelerate(model(), [Baked(directory=str(tmp_path))]), inputs(tokens=7))
    assert len(BUILT) == 6 and len(sizes(tmp_path)) < 6


def test_an_engine_that_turns_out_too_large_for_the_limit_is_run_and_not_kept(tmp_path: Path) -> None:
    registry, built = Registry(tmp_path / "engines", limit_bytes=100), tmp_path / "built"
    built.mkdir()
    (built / "code.so").write_bytes(bytes(101))
    key = SimpleNamespace(digest="0" * 32, to_json=dict)
    with registry.locked(key), pytest.warns(EngineWarning, match="may hold"):
        assert not registry.keep(key, built)
    assert registry.entries() == []


@pytest.mark.parametrize("value", ["many", "-1", "0", "inf", "nan"])
def test_a_limit_that_is_none_is_refused_by_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_CACHE_LIMIT", value)
    with pytest.raises(InvalidConfig, match="FASTDIT_CACHE_LIMIT is a number of GiB above 0"):
        Registry()
