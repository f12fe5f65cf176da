"""Processes that die and disks that fill up while an engine is built or kept: a named error, and the next run heals."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pieces
import pytest
import torch
from pieces import Written
from test_interrupts import Lines
from test_registry import KEY, contents, kept, made

from fastdit import (
    AOT,
    Compile,
    EngineBuildFailed,
    EngineWarning,
    accelerate,
)
from fastdit.engine import engine_pass, places, sealed, workshop
from fastdit.engine import registry as registry_module
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.registry import Registry
from fastdit.engine.scratch import scratch

COMPILERS = pytest.mark.parametrize("engine", [Compile, AOT])

RUN = """
import resource, signal, sys
import torch
torch.set_num_threads(1)
import fastdit, pieces
from fastdit.errors import EngineBuildFailed

module, hidden_states = pieces.model(), pieces.inputs()
twin = fastdit.accelerate(module, [getattr(fastdit, sys.argv[1])(directory=sys.argv[2])])
with torch.no_grad():
    plain = module(hidden_states)

def run():
    torch.testing.assert_close(pieces.run(twin, hidden_states), plain, rtol=1e-5, atol=1e-5)
"""

ON_A_FULL_DISK = (
    RUN
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def refused_where_the_disk_is_full(error):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        run()
    except error as refusal:
        print(refusal)
    else:
        sys.exit("nothing was refused")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

refused_where_the_disk_is_full(EngineBuildFailed)
run()
assert [build.kept for build in twin.fastdit.workshop.builds] == [False]
"""
)


def process(script: str, engine: Any, folder: Path) -> subprocess.Popen[str]:
    """Run a script in a process group of its own, whose temporary files are in `folder`/temporary."""
    (folder / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, engine.__name__, str(folder / "engines")]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.exhaustive
@COMPILERS
def test_a_process_that_is_killed_in_the_compiler_leaves_nothing_and_the_next_one_builds(
    engine: Any, tmp_path: Path
) -> None:
    building = process(RUN + "run()", engine, tmp_path)
    while building.poll() is None and not any((tmp_path / "temporary").rglob("*.cpp")):
        time.sleep(0.01)
    os.killpg(building.pid, signal.SIGKILL)
    _, said = building.communicate()
    assert building.returncode == -signal.SIGKILL, said
    assert Registry(tmp_path / "engines").entries() == []
    healed(engine(directory=str(tmp_path / "engines")), tmp_path / "engines")


@pytest.mark.exhaustive
@COMPILERS
def test_a_compiler_leaves_nothing_in_the_folder_that_processes_share_and_so_takes_nothing_from_it(
    engine: Any, tmp_path: Path
) -> None:
    building = process(RUN + "run()", engine, tmp_path)
    _, said = building.communicate()
    assert building.returncode == 0, said
    assert [*filter(Path.is_file, (tmp_path / "temporary").rglob("*"))] == []


def _working(here: Path, seconds: float) -> None:
    tempfile.tempdir = str(here)
    (scratch() / "engine.blob").write_bytes(bytes(1000))
    time.sleep(seconds)


def test_what_a_killed_process_left_among_the_temporary_files_goes_and_a_living_one_s_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    killed, living = (context.Process(target=_working, args=(tmp_path, 600.0)) for _ in range(2))
    killed.start()
    while not (left := [*tmp_path.glob("*/engine.blob")]):
        time.sleep(0.01)
    living.start()
    while len(all_of_them := [*tmp_path.glob("*/engine.blob")]) < 2:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    later = context.Process(target=_working, args=(tmp_path, 0.0))
    later.start()
    later.join()
    assert later.exitcode == 0
    assert not left[0].exists() and next(path for path in all_of_them if path not in left).exists()
    living.kill()
    living.join()


def test_what_strangers_left_among_the_temporary_files_is_neither_followed_nor_written_to(tmp_path: Path) -> None:
    mine, temporary = tmp_path / "mine", tmp_path / "temporary"
    mine.mkdir()
    (mine / "lock").write_text("keep me")
    (temporary / "fastdit-engines-a").mkdir(parents=True)
    (temporary / "fastdit-engines-a" / "lock").symlink_to(mine / "lock")
    (temporary / "fastdit-engines-b").symlink_to(mine)
    (temporary / "fastdit-engines-c").mkdir()
    (temporary / "fastdit-engines-c" / "deep").symlink_to(mine)
    os.mkfifo(temporary / "fastdit-engines-d")
    if os.geteuid() == 0:  # only root gives files to others
        os.chown(temporary / "fastdit-engines-c", 12345, -1)
    working = multiprocessing.get_context("fork").Process(target=_working, args=(temporary, 0.0))
    working.start()
    working.join(20)
    assert working.exitcode == 0
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"lock": "keep me"}
    assert (temporary / "fastdit-engines-c").exists() == (os.geteuid() == 0)
    (own,) = (path.parent for path in temporary.glob("*/engine.blob"))
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


FORKED = """
import os, sys
from fastdit.engine.scratch import _hold, scratch

here = scratch()
(here / "engine.blob").touch()
if (child := os.fork()) == 0:
    sys.exit(int(scratch() == here))
_, status = os.waitpid(child, 0)
print(status, _hold(here), here, (here / "engine.blob").exists())
"""


def test_a_forked_child_has_a_folder_of_its_own_and_its_end_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environment, text=True, capture_output=True, check=True)
    status, held, _, exists = done.stdout.split()
    assert (status, held, exists) == ("0", "None", "True"), "the folder is there, and locked as before"
    assert not any(tmp_path.iterdir()), "both are gone with their processes"


@pytest.mark.exhaustive
@COMPILERS
def test_a_disk_that_is_full_while_the_compiler_writes_is_a_named_error_and_room_heals_it(
    engine: Any, tmp_path: Path
) -> None:
    done = process(ON_A_FULL_DISK, engine, tmp_path)
    said, errors = done.communicate()
    assert done.returncode == 0, errors
    assert f"{engine.__name__}(" in said and "can't build blocks.0 (Block)" in said
    assert len(Registry(tmp_path / "engines").entries()) == 1


def healed(engine: Any, directory: Path) -> None:
    """Demand that an engine gives the plain numbers and is kept."""
    module, hidden_states = pieces.model(), pieces.inputs()
    with torch.no_grad():
        plain = module(hidden_states)
    found = pieces.run(accelerate(module, [engine]), hidden_states)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert len(Registry(directory).entries()) == 1
    gc.collect()


@pytest.mark.exhaustive
@COMPILERS
def test_every_file_of_a_compiled_engine_is_refused_once_it_is_cut_changed_or_missing(
    engine: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "engines"
    healed(engine(directory=str(directory)), directory)
    (folder,) = directory.glob("?" * 32)
    whole = contents(folder)
    key = KeyOf(folder)
    assert len(whole) > 2
    for name in whole:
        for damage in (lambda data: data[: len(data) // 2], lambda data: bytes([data[0] ^ 1]) + data[1:], None):
            write(folder, whole)
            if damage is None:
                (folder / name).unlink()
            elif whole[name]:
                (folder / name).write_bytes(damage(whole[name]))
            else:
                continue
            (tmp_path / "out").mkdir(exist_ok=True)
            with pytest.warns(EngineWarning, match="removed and built again"):
                assert not Registry(directory).read(key, tmp_path / "out"), name
            assert not any((tmp_path / "out").iterdir()) and not folder.exists()


class KeyOf:
    """The key under which a folder is kept, as its manifest has it."""

    def __init__(self, folder: Path) -> None:
        self.digest = folder.name
        (entry,) = Registry(folder.parent).entries()
        self._texts = entry.key

    def to_json(self) -> dict[str, str]:
        return self._texts


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _dying(directory: Path, where: str) -> None:
    """Keep an engine, and be killed at a step of it."""

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "the seal":
        registry_module.seal = die
    else:
        setattr(registry_module.os if where == "replace" else registry_module.shutil, where, die)
    with Registry(directory).locked(KEY):
        Registry(directory).keep(KEY, made(directory.parent / "made"))


@pytest.mark.parametrize("where", ["copytree", "the seal", "replace"])
@pytest.mark.parametrize("before", [False, True], ids=["nothing was kept", "something was kept"])
def test_a_process_that_is_killed_while_it_keeps_an_engine_leaves_it_whole_or_not_at_all(
    where: str, before: bool, tmp_path: Path
) -> None:
    directory = tmp_path / "engines"
    if before:
        kept(directory)
    dying = multiprocessing.get_context("fork").Process(target=_dying, args=(directory, where))
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    (tmp_path / "out").mkdir()
    if Registry(directory).read(KEY, tmp_path / "out"):
        assert contents(tmp_path / "out") == contents(made(tmp_path / "again"))
    assert len(kept(directory).entries()) == 1
    assert [path.name for path in directory.glob(".*.partial")] == []


@pytest.mark.exhaustive
@pytest.mark.usefixtures("only_new_objects")
def test_after_an_interrupt_at_any_line_of_a_build_the_next_call_builds_and_keeps_it_whole(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    watched = (workshop, registry_module, sealed, places, engine_pass)
    expected = pieces.model()(pieces.inputs()).detach()

    def twin_in(directory: Path) -> Any:
        return accelerate(pieces.model(), [Written(directory=str(directory))])

    def interrupted(at: int | None, directory: Path) -> tuple[Lines, Any]:
        gc.collect()  # else an engine of a twin before is still there
        lines, twin = Lines(watched, at), twin_in(directory)
        with suppress(KeyboardInterrupt):
            lines.run(lambda: pieces.run(twin, pieces.inputs()))
        return lines, twin

    count = interrupted(None, tmp_path / "whole")[0].count
    assert count > 100
    for at in range(0, count, 1 if pytestconfig.getoption("--exhaustive") else count // 20):
        directory = tmp_path / str(at)
        lines, twin = interrupted(at, directory)
        assert lines.place
        assert torch.equal(pieces.run(twin, pieces.inputs()), expected), lines.place
        assert [*directory.glob(".*.partial")] == [] and len(Registry(directory).entries()) == 1, lines.place
        assert torch.equal(pieces.run(twin_in(directory), pieces.inputs()), expected), lines.place


def _limited(act: Callable[[], None], largest: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    act()
    os._exit(7)


def on_a_full_disk(act: Callable[[], None], largest: int) -> None:
    """Do something in a process that can't write files of more than `largest` bytes."""
    child = multiprocessing.get_context("fork").Process(target=_limited, args=(act, largest))
    child.start()
    child.join()
    assert child.exitcode == 7


def test_a_disk_without_room_for_a_copy_of_what_is_kept_is_a_named_error_and_what_is_kept_stays(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "engines"
    pieces.run(accelerate(pieces.model(), [Written(directory=str(directory))]), pieces.inputs())
    gc.collect()
    twin = accelerate(pieces.model(), [Written(directory=str(directory))])

    def run() -> None:
        with pytest.raises(EngineBuildFailed, match="File too large"):
            pieces.run(twin, pieces.inputs())

    on_a_full_disk(run, 1000)
    assert len(Registry(directory).entries()) == 1


@dataclasses.dataclass(frozen=True)
class Filling(Written):
    """Is built, and then the disk is full."""

    def build(self, call: PieceCall, folder: Path) -> Execute:
        execute = super().build(call, folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return execute


def test_an_engine_that_there_is_no_room_to_keep_is_used_all_the_same_and_that_is_said(tmp_path: Path) -> None:
    module, hidden_states = pieces.model(), pieces.inputs()
    twin = accelerate(module, [Filling(directory=str(tmp_path / "engines"))])
    with torch.no_grad():
        plain = module(hidden_states)

    def run() -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.equal(pieces.run(twin, hidden_states), plain)
        assert [type(one.message) for one in said] == [EngineWarning] and "can't be kept" in str(said[0].message)

    on_a_full_disk(run, 5000)
    assert Registry(tmp_path / "engines").entries() == []
