"""Where engines are kept: a folder for each key, written whole or not at all, read only if it is as it was written.

    <directory>/<digest of the key>/manifest.json    the key, the files with their sizes and SHA-256, and a seal
    <directory>/<digest of the key>/...              the files
    <directory>/.<digest of the key>.lock            held by whoever reads, builds or removes the entry

The seal is an HMAC of the manifest under a secret of the user's, which lies outside the directory. Compiled code is
code: what somebody else put there, or what has changed since, is removed with a warning and built again, never loaded.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from fastdit.errors import EngineWarning, InvalidConfig

VERSION = 1
_MANIFEST = "manifest.json"
_SECRET_BYTES = 32

#: Length of a digest in hexadecimal digits; nothing in a directory is touched that is not named by one.
_DIGITS = 32

#: How much a directory keeps unless told otherwise; the entries that were used longest ago go first.
LIMIT_BYTES = 8 << 30


class Key(Protocol):
    """What an entry is found by."""

    @property
    def digest(self) -> str:
        """A name for the key that no other key has."""

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

    @contextmanager
    def locked(self, key: Key) -> Iterator[None]:
        """Hold a key: whoever else wants it waits. Raises `InvalidConfig` where the directory can't be written."""
        with self._lock(key.digest):
            yield

    def read(self, key: Key, into: Path) -> bool:
        """Copy the files of a key into a folder, if they are all as they were written. The key is held.

        Raises `OSError` where there is no room for the copy; what is kept stays.
        """
        folder = self.directory / key.digest
        if not folder.exists():
            return False
        try:
            manifest = self._manifest(folder)
            if manifest["key"] != key.to_json():
                raise _Unfit("it was built for something else")
            contents = dict(self._contents(folder, manifest))
            os.utime(folder / _MANIFEST)
        except (_Unfit, OSError) as error:
            warnings.warn(
                f"the engine kept in {folder} is not as fastdit wrote it ({error}); it is removed and built again",
                EngineWarning,
                stacklevel=2,
            )
            shutil.rmtree(folder, ignore_errors=True)
            return False
        for name, content in contents.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def keep(self, key: Key, made: Path) -> bool:
        """Keep what lies in the folder `made` under a key, which is held; warns where there is no room for it."""
        for left_over in self.directory.glob(f".{key.digest}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = self.directory / f".{key.digest}.{secrets.token_hex(4)}.partial"
        final = self.directory / key.digest
        try:
            shutil.copytree(made, partial)
            files = {
                name: {"bytes": path.stat().st_size, "sha256": _sha256(path.read_bytes())}
                for name, path in _files(partial)
            }
            self._seal(partial, {"fastdit_engine": VERSION, "key": key.to_json(), "files": files})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            warnings.warn(
                f"an engine can't be kept in {self.directory} ({error}), so the next process builds it again; make "
                "room there, or give another directory",
                EngineWarning,
                stacklevel=2,
            )
            return False
        self._trim(final)
        return True

    def remove(self, key: Key) -> None:
        """Remove what is kept under a key, which is held."""
        shutil.rmtree(self.directory / key.digest, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """List what is kept, last used first; what can't be read is left out."""
        found = []
        for folder in self._folders():
            try:
                manifest = self._manifest(folder)
                size = sum(path.stat().st_size for _, path in _files(folder))
                used = (folder / _MANIFEST).stat().st_mtime
            except (_Unfit, OSError):
                continue
            found.append(Entry(folder.name, manifest["key"], size, used))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove everything that is kept, and give the number of entries. Engines in use stay as they are."""
        folders = self._folders()
        for folder in folders:
            with self._lock(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        for left_over in self.directory.glob(f".{'[0-9a-f]' * _DIGITS}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        return len(folders)

    def _folders(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.glob("[0-9a-f]" * _DIGITS) if path.is_dir()]

    def _trim(self, newest: Path) -> None:
        """Remove the entries used longest ago until the rest fits; the newest one stays."""
        sizes = {folder: sum(path.stat().st_size for _, path in _files(folder)) for folder in self._folders()}
        total = sum(sizes.values())
        for folder in sorted(sizes, key=_last_used):
            if total <= self.limit_bytes:
                return
            if folder != newest:
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

    def _manifest(self, folder: Path) -> dict[str, Any]:
        """Read an entry's manifest. Raises `_Unfit` unless it was written here by this user."""
        path = folder / _MANIFEST
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _Unfit(f"its manifest can't be read: {error}") from error
        if not isinstance(data, dict) or set(data) != {"manifest", "seal"} or not isinstance(data["seal"], str):
            raise _Unfit("its manifest is not one of fastdit's")
        if not hmac.compare_digest(data["seal"].encode(), _seal(data["manifest"]).encode()):
            raise _Unfit("its manifest does not carry this user's seal")
        manifest: dict[str, Any] = data["manifest"]
        if manifest.get("fastdit_engine") != VERSION:
            raise _Unfit("it was written in another version")
        return manifest

    def _contents(self, folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Read an entry's files. Raises `_Unfit` for one that is missing, added or changed."""
        listed = manifest["files"]
        present = dict(_files(folder))
        if added := sorted(set(present) - set(listed) - {_MANIFEST}):
            raise _Unfit(f"{added[0]} was put there later")
        for name, facts in listed.items():
            if name not in present:
                raise _Unfit(f"{name} is missing")
            content = present[name].read_bytes()
            if len(content) != facts["bytes"] or _sha256(content) != facts["sha256"]:
                raise _Unfit(f"{name} has changed")
            yield name, content

    def _seal(self, folder: Path, manifest: dict[str, Any]) -> None:
        data = {"manifest": manifest, "seal": _seal(manifest)}
        (folder / _MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


class _Unfit(Exception):
    """What is kept is not what fastdit wrote; the text says why."""


def cache_home() -> Path:
    """Give fastdit's cache folder: $FASTDIT_CACHE, or `fastdit` in $XDG_CACHE_HOME, or ~/.cache/fastdit."""
    if own := os.environ.get("FASTDIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdit"


def _seal(manifest: Any) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hmac.new(_secret(), text.encode(), hashlib.sha256).hexdigest()


def _secret() -> bytes:
    """Read the user's secret; it is made, for the user's eyes only, where there is none or what is there is none."""
    path = cache_home() / "seal"
    if path.exists() and len(content := path.read_bytes()) == _SECRET_BYTES:
        return content
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists() or path.stat().st_size != _SECRET_BYTES:
            descriptor, name = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_SECRET_BYTES))
            os.replace(name, path)
        return path.read_bytes()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """List the files of a folder by their paths in it, links and all."""
    return sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.is_dir())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _last_used(folder: Path) -> float:
    manifest = folder / _MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0
