"""Where engines are kept: a folder for each key, written whole or not at all, read only if it is as it was written.

    <directory>/<digest of the key>/           a sealed folder (`sealed.py`) with the engine's files
    <directory>/.<digest of the key>.lock      held by whoever reads, builds or removes the entry

Compiled code is code: what somebody else put there, or what has changed since, is removed with a warning and built
again, never loaded. From a directory that others can write to, or this user can't, engines are read and nothing else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from fastdit.engine.places import cache_home, cache_limit, expanded, made, others_write
from fastdit.engine.room import ENTRIES, Room, last_used, size_of
from fastdit.engine.sealed import MANIFEST, Unfit, contents_of, manifest_of, seal
from fastdit.errors import EngineBuildFailed, EngineWarning, InvalidConfig


class Key(Protocol):
    """What an entry is found by."""

    @property
    def digest(self) -> str:
        """A name for the key that no other key has, of `DIGITS` hexadecimal digits."""

    def to_json(self) -> dict[str, str]:
        """The key as plain texts."""


@dataclass(frozen=True)
class Entry:
    """What is kept under one key. `used` is the time of its last use, in seconds since the epoch."""

    digest: str
    key: dict[str, str]
    size: int
    used: float


class Registry:
    """The engines that are kept in one directory. Safe under several processes, of which one at a time builds a key.

    `limit_bytes` bounds all that is kept there, $FASTDIT_CACHE_LIMIT unless given; `room.py` says what goes by it.
    """

    def __init__(self, directory: str | Path | None = None, *, limit_bytes: int | None = None) -> None:
        own = None if directory is None else expanded(Path(directory), "give the whole path")
        self.directory = cache_home() / "engines" if own is None else own
        self.room = Room(self.directory, cache_limit() if limit_bytes is None else limit_bytes)

    @property
    def only_read(self) -> str | None:
        """Say why nothing is written to the directory; None where it is this user's to write to, and nobody else's."""
        if (others := others_write(self.directory)) is not None:
            return f"{others}; give a directory of your own"
        return None if os.access(self.directory, os.W_OK) else f"this user can't write to {self.directory}"

    def locked(self, key: Key) -> AbstractContextManager[object]:
        """Hold a key, in a `with`: whoever else wants it waits. Raises `InvalidConfig` for a directory that can't be.

        Where the directory is only read there is nothing to wait for.
        """
        return self._lock(key.digest)

    def read(self, key: Key, into: Path) -> bool:
        """Copy the files of a key into a folder, if they are all as they were written. The key is held.

        Raises `OSError` where there is no room for the copy; what is kept stays.
        """
        folder = self.directory / key.digest
        if not os.path.lexists(folder):
            return False
        try:
            manifest = manifest_of(folder)
            if manifest["key"] != key.to_json():
                raise Unfit("it was built for something else")
            contents = contents_of(folder, manifest)
        except Unfit as error:
            self.remove(key)
            done = "stays, since nothing is written there" if os.path.lexists(folder) else "is removed and built again"
            _remark(f"the engine kept in {folder} is not as fastdit wrote it ({error}); it {done}")
            return False
        except (InvalidConfig, OSError) as error:
            _remark(
                f"the engine kept in {folder} can't be read by this user ({error}); it stays and is built again here"
            )
            return False
        if self.only_read is None:
            os.utime(folder / MANIFEST)
        for name, content in contents.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def keep(self, key: Key, built: Path) -> bool:
        """Keep what lies in the folder `built`, and seal it, under a key that is held; warns where it can't."""
        if (why := self.only_read) is None:
            self._remove_partial(key.digest)
            partial = self._partial(key.digest)
            try:
                seal(built, key.to_json())
                self.make_room(key, size_of(built))
                shutil.copytree(built, partial)
                self.remove(key)
                os.replace(partial, self.directory / key.digest)
            except EngineBuildFailed as error:  # there is no room
                why = str(error)
            except (InvalidConfig, OSError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                why = f"{error}; make room there, or give another directory"
            else:
                return True
        _remark(f"an engine can't be kept in {self.directory}, so the next process builds it again: {why}")
        return False

    def remove(self, key: Key) -> None:
        """Remove what is kept under a key, which is held, where anything is written."""
        if self.only_read is None:
            self._discard(self.directory / key.digest)

    def _discard(self, entry: Path) -> None:
        """Take an entry away at once, and then apart, whatever lies in its place."""
        partial = self._partial(entry.name)
        with suppress(OSError):
            entry.rename(partial)
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink()

    def _partial(self, digest: str) -> Path:
        return self.directory / f".{digest}.{secrets.token_hex(4)}.partial"

    def entries(self) -> list[Entry]:
        """List what is kept, last used first; what can't be read is left out."""
        found = []
        for folder in self.directory.glob(ENTRIES):
            with suppress(Unfit, OSError):
                found.append(Entry(folder.name, manifest_of(folder)["key"], size_of(folder), last_used(folder)))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove everything that is kept, and give the number of entries. Engines in use stay as they are."""
        folders = list(self.directory.glob(ENTRIES))
        for folder in folders:
            with self._lock(folder.name):
                self._discard(folder)
        self._remove_partial(ENTRIES)
        return len(folders)

    def _remove_partial(self, digest: str) -> None:
        """Remove what was left half written by a process that died."""
        for left_over in self.directory.glob(f".{digest}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)

    def make_room(self, key: Key, size: int, *, building: bool = False) -> None:
        """Remove the entries used longest ago until `size` bytes fit under a key, which is held (`Room.made`).

        Raises `EngineBuildFailed` where they can't. Where the directory is only read nothing is to be kept.
        """
        for folder in self.room.made(size, key.digest, building=building) if self.only_read is None else ():
            with suppress(Timeout), self._lock(folder.name, timeout=0):  # one that is in use stays
                self._discard(folder)

    def _lock(self, digest: str, timeout: float = -1) -> AbstractContextManager[object]:
        try:
            made(self.directory)
        except OSError as error:
            raise InvalidConfig(
                f"engines can't be kept in {self.directory}: {error}; give a directory that can be written"
            ) from error
        return nullcontext() if self.only_read else FileLock(self.directory / f".{digest}.lock", timeout=timeout)


def _remark(text: str) -> None:
    warnings.warn(text, EngineWarning, stacklevel=3)


def warn_of_no_use(key: Key, shape: str, what: str) -> None:
    """Warn that an engine which is kept as it was written can't be used, and say what is done about it."""
    said = f"the engine kept for {key.to_json()['piece']} {shape} is as it was written and of no use all the same"
    warnings.warn(f"{said} {what}", EngineWarning, stacklevel=3)
