"""Where engines are kept: a folder for each key, written whole or not at all, read only if it is as it was written.

    <directory>/<digest of the key>/           a sealed folder (`sealed.py`) with the engine's files
    <directory>/.<digest of the key>.lock      held by whoever reads, builds or removes the entry

Compiled code is code: what somebody else put there, or what has changed since, is removed with a warning and built
again, never loaded.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from fastdit.engine.sealed import DIGITS, MANIFEST, Unfit, cache_home, contents_of, files_in, manifest_of, seal
from fastdit.errors import EngineWarning, InvalidConfig

#: How much a directory keeps unless told otherwise; the entries that were used longest ago go first.
LIMIT_BYTES = 8 << 30

#: The names of entries. Nothing in a directory is touched that is not named by a digest.
_ENTRIES = "[0-9a-f]" * DIGITS


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
    """The engines that are kept in one directory. Safe under several processes, of which one at a time builds a key."""

    def __init__(self, directory: str | Path | None = None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.directory = Path(directory).expanduser() if directory is not None else cache_home() / "engines"
        self.limit_bytes = limit_bytes

    def locked(self, key: Key) -> FileLock:
        """Hold a key, in a `with`: whoever else wants it waits. Raises `InvalidConfig` where nothing can be written."""
        return self._lock(key.digest)

    def read(self, key: Key, into: Path) -> bool:
        """Copy the files of a key into a folder, if they are all as they were written. The key is held.

        Raises `OSError` where there is no room for the copy; what is kept stays.
        """
        folder = self.directory / key.digest
        if not folder.exists():
            return False
        try:
            manifest = manifest_of(folder)
            if manifest["key"] != key.to_json():
                raise Unfit("it was built for something else")
            contents = contents_of(folder, manifest)
            os.utime(folder / MANIFEST)
        except (Unfit, OSError) as error:
            warnings.warn(
                f"the engine kept in {folder} is not as fastdit wrote it ({error}); it is removed and built again",
                EngineWarning,
                stacklevel=2,
            )
            self.remove(key)
            return False
        for name, content in contents.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def keep(self, key: Key, made: Path) -> bool:
        """Keep what lies in the folder `made` under a key, which is held; warns where there is no room for it."""
        self._remove_partial(key.digest)
        partial = self.directory / f".{key.digest}.{secrets.token_hex(4)}.partial"
        try:
            shutil.copytree(made, partial)
            seal(partial, key.to_json())
            self.remove(key)
            os.replace(partial, self.directory / key.digest)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            warnings.warn(
                f"an engine can't be kept in {self.directory} ({error}), so the next process builds it again; make "
                "room there, or give another directory",
                EngineWarning,
                stacklevel=2,
            )
            return False
        self._trim(key.digest)
        return True

    def remove(self, key: Key) -> None:
        """Remove what is kept under a key, which is held."""
        shutil.rmtree(self.directory / key.digest, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """List what is kept, last used first; what can't be read is left out."""
        found = []
        for folder in self.directory.glob(_ENTRIES):
            with suppress(Unfit, OSError):
                found.append(Entry(folder.name, manifest_of(folder)["key"], _size(folder), _last_used(folder)))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove everything that is kept, and give the number of entries. Engines in use stay as they are."""
        folders = list(self.directory.glob(_ENTRIES))
        for folder in folders:
            with self._lock(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        self._remove_partial(_ENTRIES)
        return len(folders)

    def _remove_partial(self, digest: str) -> None:
        """Remove what was left half written by a process that died."""
        for left_over in self.directory.glob(f".{digest}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _trim(self, newest: str) -> None:
        """Remove the entries used longest ago until the rest fits; the newest one stays."""
        sizes = {folder: _size(folder) for folder in self.directory.glob(_ENTRIES)}
        total = sum(sizes.values())
        for folder in sorted(sizes, key=_last_used):
            if total <= self.limit_bytes:
                return
            if folder.name != newest:
                with suppress(Timeout), self._lock(folder.name).acquire(timeout=0):  # one that is in use stays
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= sizes[folder]

    def _lock(self, digest: str) -> FileLock:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(
                f"engines can't be kept in {self.directory}: {error}; give a directory that can be written"
            ) from error
        return FileLock(self.directory / f".{digest}.lock")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder).values())


def _last_used(folder: Path) -> float:
    manifest = folder / MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0
