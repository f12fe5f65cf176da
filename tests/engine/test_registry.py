"""What is kept of engines: whole or not at all, read as it was written or built again, one builder at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit.engine.registry import Registry
from fastdit.engine.sealed import _secret
from fastdit.errors import EngineWarning, InvalidConfig


@dataclass(frozen=True)
class Key:
    name: str

    @property
    def digest(self) -> str:
        return self.name.encode().hex().rjust(32, "0")

    def to_json(self) -> dict[str, str]:
        return {"engine": "Test", "piece": self.name}


KEY = Key("block")


def made(folder: Path, size: int = 300) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "package.bin").write_bytes(bytes(i % 251 for i in range(size)))
    (folder / "deep" / "facts.json").write_text('{"a": 1}')
    return folder


def kept(directory: Path, key: Key = KEY, **options: Any) -> Registry:
    registry = Registry(directory, **options)
    source = made(directory.parent / f"made-{key.name}-{time.monotonic_ns()}")
    with registry.locked(key):
        assert registry.keep(key, source)
    return registry


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    registry = kept(tmp_path / "engines")
    (tmp_path / "out").mkdir()
    with registry.locked(KEY):
        assert registry.read(KEY, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made(tmp_path / "again"))
    assert [entry.key for entry in registry.entries()] == [KEY.to_json()]


def test_an_unknown_key_is_not_found_and_nothing_is_said(tmp_path: Path) -> None:
    assert not kept(tmp_path / "engines").read(Key("other"), tmp_path)


@given(data=st.data())
def test_a_changed_byte_or_a_cut_anywhere_is_noticed_and_healed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("x") / "engines"
    registry = kept(directory)
    files = sorted(path for path in (directory / KEY.digest).rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    out = directory.parent / "out"
    out.mkdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = registry.read(KEY, out)
    if found:  # a change of the manifest's layout, which means the same
        assert path.name == "manifest.json" and "package.bin" in contents(out)
        assert contents(out) == contents(made(directory.parent / "again"))
    else:
        assert [type(one.message) for one in said] == [EngineWarning] and not any(out.iterdir())
        assert not (directory / KEY.digest).exists()
        kept(directory)
        assert registry.read(KEY, out)


@pytest.mark.parametrize("tampering", ["a file is added", "a file is missing", "another key's entry", "another's seal"])
def test_an_entry_that_fastdit_did_not_write_so_is_refused(
    tmp_path: Path, tampering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "engines"
    if tampering == "another's seal":
        with pytest.MonkeyPatch.context() as other:
            other.setenv("FASTDIT_STATE", str(tmp_path / "other user"))
            kept(directory)
    registry = kept(directory, Key("other") if tampering == "another key's entry" else KEY)
    if tampering == "another's seal":
        monkeypatch.setenv("FASTDIT_STATE", str(tmp_path / "third user"))
    elif tampering == "another key's entry":
        shutil.move(directory / Key("other").digest, directory / KEY.digest)
    elif tampering == "a file is added":
        (directory / KEY.digest / "evil.so").write_bytes(b"code")
    else:
        (directory / KEY.digest / "package.bin").unlink()
    (tmp_path / "out").mkdir()
    with pytest.warns(EngineWarning, match="removed and built again"):
        assert not registry.read(KEY, tmp_path / "out")


def test_the_entries_used_longest_ago_make_room(tmp_path: Path) -> None:
    registry = kept(tmp_path / "engines", Key("a"))
    size = registry.entries()[0].size
    limit = 2 * size + size // 2
    for name in ("b", "c"):
        os.utime(tmp_path / "engines" / Key("a").digest / "manifest.json", (1, 1))
        kept(tmp_path / "engines", Key(name), limit_bytes=limit)
    assert {entry.key["piece"] for entry in registry.entries()} == {"b", "c"}


def test_clearing_removes_engines_and_nothing_else(tmp_path: Path) -> None:
    registry = kept(tmp_path / "engines")
    mine = tmp_path / "engines" / "holiday" / "photo.png"
    mine.parent.mkdir()
    mine.write_bytes(b"dear")
    assert registry.clear() == 1 and registry.entries() == []
    assert mine.read_bytes() == b"dear"


def test_a_directory_that_can_t_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="can't be kept in"), Registry(tmp_path / "file" / "x").locked(KEY):
        pass


SECRETS: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda secret, other: secret.write_bytes(b"short"),
    "readable by others": lambda secret, other: secret.chmod(0o644),
    "a link": lambda secret, other: (secret.unlink(), secret.symlink_to(other)),
    "a pipe": lambda secret, other: (secret.unlink(), os.mkfifo(secret, 0o600)),
    "another user's": lambda secret, other: os.chown(secret, 12345, -1),
}
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.mark.parametrize("what", [pytest.param(what, marks=AS_ROOT if "user" in what else ()) for what in SECRETS])
def test_a_secret_that_others_may_know_or_have_put_there_is_made_anew_and_old_entries_are_built_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDIT_STATE", str(tmp_path / "state"))
    registry = kept(tmp_path / "engines")
    secret, other = tmp_path / "state" / "seal", tmp_path / "other"
    other.write_bytes(bytes(32))
    SECRETS[what](secret, other)
    (tmp_path / "out").mkdir()
    with pytest.warns(EngineWarning, match="seal"):
        assert not registry.read(KEY, tmp_path / "out")
    kept(tmp_path / "engines")
    assert registry.read(KEY, tmp_path / "out")
    assert stat.S_IMODE(secret.lstat().st_mode) == 0o600 and secret.lstat().st_uid == os.getuid()
    assert other.read_bytes() == bytes(32)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
def test_whatever_the_umask_nobody_else_gets_at_engines_or_secret(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "source")
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path / "around" / "cache"))
    monkeypatch.setenv("FASTDIT_STATE", str(tmp_path / "around" / "state"))
    before = os.umask(umask)
    try:
        registry = Registry()
        with registry.locked(KEY):
            pass
        _secret()
    finally:
        os.umask(before)
    around = tmp_path / "around"
    for folder in (around, around / "cache", around / "cache" / "engines", around / "state"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((around / "state" / "seal").stat().st_mode) & 0o077 == 0


def test_a_state_folder_that_others_can_look_into_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir(0o755)
    monkeypatch.setenv("FASTDIT_STATE", str(tmp_path / "state"))
    kept(tmp_path / "engines")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def broken_state(state: Path, how: str) -> None:
    """Leave a user without a secret."""
    if how == "everybody writes there":
        state.mkdir()
        state.chmod(0o777)
    elif how == "its parent is everybody's":
        state.mkdir()
        state.parent.chmod(0o777)
    elif how == "its parent is another user's":
        state.mkdir()
        os.chown(state.parent, 12345, -1)
    elif how == "it is a file":
        state.write_text("")
    else:
        state.mkdir()
        os.chown(state, 12345, -1)


@pytest.mark.parametrize(
    "how",
    [
        "everybody writes there",
        "its parent is everybody's",
        "it is a file",
        pytest.param("it is another user's", marks=AS_ROOT),
        pytest.param("its parent is another user's", marks=AS_ROOT),
    ],
)
def test_a_user_without_a_secret_takes_nothing_keeps_nothing_and_removes_nothing_of_others(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = kept(tmp_path / "engines")
    before = contents(tmp_path / "engines")
    monkeypatch.setenv("FASTDIT_STATE", str(tmp_path / "home" / "state"))
    (tmp_path / "home").mkdir()
    broken_state(tmp_path / "home" / "state", how)
    (tmp_path / "out").mkdir()
    with pytest.warns(EngineWarning, match=r"can't be read by this user .*FASTDIT_STATE.*it stays"):
        assert not registry.read(KEY, tmp_path / "out")
    with registry.locked(KEY), pytest.warns(EngineWarning, match="can't be kept.*FASTDIT_STATE"):
        assert not registry.keep(KEY, made(tmp_path / "again"))
    assert contents(tmp_path / "engines") == before and not any((tmp_path / "out").iterdir())


def test_a_reader_that_may_not_open_an_entry_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = kept(tmp_path / "engines")
    before, real = contents(tmp_path / "engines"), os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("package.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    (tmp_path / "out").mkdir()
    with pytest.warns(EngineWarning, match=r"can't be read by this user .*Permission denied.* it stays"):
        assert not registry.read(KEY, tmp_path / "out")
    assert contents(tmp_path / "engines") == before


@pytest.mark.parametrize("whose", ["everybody's", "everybody's, who may remove what is theirs", "a group's"])
def test_from_a_folder_that_others_can_write_to_engines_are_read_and_nothing_is_written(
    whose: str, tmp_path: Path
) -> None:
    directory = tmp_path / "engines"
    registry = kept(directory, Key("other"))
    kept(directory)
    (directory / Key("other").digest / "package.bin").write_bytes(b"planted")
    next(directory.glob(f".{KEY.digest}.lock")).unlink()
    directory.chmod({"everybody's": 0o777, "a group's": 0o770}.get(whose, 0o1777))
    if whose == "a group's":
        os.chown(directory, -1, 12345) if os.geteuid() == 0 else pytest.skip("only root gives files to others")
    before = contents(directory)
    (tmp_path / "out").mkdir()
    with registry.locked(KEY):
        assert registry.read(KEY, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made(tmp_path / "again"))
    with pytest.warns(EngineWarning, match="it stays, since nothing is written there"):
        assert not registry.read(Key("other"), tmp_path / "out")
    with pytest.warns(EngineWarning, match=r"can't be kept.* can write to .*directory of your own"):
        assert not registry.keep(KEY, tmp_path / "again")
    assert contents(directory) == before


def nested(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"manifest": ' + "[" * 100_000 + "]" * 100_000 + ', "seal": "0"}')


def of_surrogates(entry: Path) -> None:
    written = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**written, "seal": "\ud800" * 64}))


def replaced(entry: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    make(entry)


BROKEN: dict[str, Callable[[Path], object]] = {
    "a manifest nested without end": nested,
    "a seal of surrogates": of_surrogates,
    "a manifest of a number": lambda entry: (entry / "manifest.json").write_text("1" * 5000),
    "a manifest that is no text": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe" * 9),
    "a manifest that is a folder": lambda entry: replaced(entry / "manifest.json", Path.mkdir),
    "a manifest that is a pipe": lambda entry: replaced(entry / "manifest.json", os.mkfifo),
    "a file that is a pipe": lambda entry: replaced(entry / "package.bin", os.mkfifo),
    "a file that is a link": lambda entry: replaced(
        entry / "package.bin", lambda path: path.symlink_to(entry / "deep" / "facts.json")
    ),
    "an entry that is a plain file": lambda entry: replaced(entry, Path.touch),
    "an entry that is a pipe": lambda entry: replaced(entry, os.mkfifo),
    "an entry that is a link to nothing": lambda entry: replaced(entry, lambda path: path.symlink_to("nothing")),
    "an entry that is a link to a folder": lambda entry: replaced(
        entry, lambda path: path.symlink_to(entry.parent / "holiday")
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_lies_in_an_entry_s_place_is_removed_with_a_warning_and_room_is_made(
    what: str, tmp_path: Path
) -> None:
    directory = tmp_path / "engines"
    registry = kept(directory)
    mine = directory / "holiday" / "photo.png"
    mine.parent.mkdir()
    mine.write_bytes(b"dear")
    BROKEN[what](directory / KEY.digest)
    (tmp_path / "out").mkdir()
    with registry.locked(KEY), pytest.warns(EngineWarning, match="removed and built again"):
        assert not registry.read(KEY, tmp_path / "out")
    assert not os.path.lexists(directory / KEY.digest) and not any((tmp_path / "out").iterdir())
    kept(directory)
    assert registry.read(KEY, tmp_path / "out")
    BROKEN[what](directory / KEY.digest)
    kept(directory, Key("another"), limit_bytes=1000)  # which sizes up what lies there
    assert registry.clear() >= 1 and registry.entries() == []
    assert mine.read_bytes() == b"dear"


def test_a_user_without_an_account_or_a_home_is_told_which_folder_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "FASTDIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(InvalidConfig, match=r"no home folder.*set FASTDIT_CACHE"):
        Registry()
    with pytest.raises(InvalidConfig, match=r"no home folder.*whole path"):
        Registry("~/engines")


def _build(directory: Path, log: Path, seconds: float) -> None:
    registry = Registry(directory)
    out = Path(str(log) + f".{os.getpid()}")
    out.mkdir()
    with registry.locked(KEY):
        if not registry.read(KEY, out):
            with log.open("a") as file:
                file.write("building\n")
            time.sleep(seconds)
            registry.keep(KEY, made(out / "made"))


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "engines", tmp_path / "log", 0.3)
    processes = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "building\n"


def test_a_build_that_is_killed_leaves_nothing_that_is_read_and_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_build, args=(tmp_path / "engines", tmp_path / "log", 60.0))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    partial = tmp_path / "engines" / f".{KEY.digest}.dead.partial"
    partial.mkdir()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    registry = kept(tmp_path / "engines")
    assert not partial.exists() and len(registry.entries()) == 1


def _keep_on_a_full_disk(directory: Path) -> None:
    source = made(directory.parent / "large", size=200_000)
    Registry(directory)  # the secret fits
    _secret()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Registry(directory).locked(KEY):
            assert not Registry(directory).keep(KEY, source)
    assert [type(one.message) for one in said] == [EngineWarning]
    os._exit(7)


def test_a_disk_without_room_is_said_and_leaves_no_half_entry(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_keep_on_a_full_disk, args=(tmp_path / "engines",))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [f".{KEY.digest}.lock"]
    assert len(kept(tmp_path / "engines").entries()) == 1
