"""How much room engines have on the disk: what this process uses stays, the rest goes, that used longest ago first.

    no limit set    the rest <= max(8 GiB, what the engines of the models that run here take at least)
    a limit         all that is kept <= the limit

So the engines of a session never push each other out, however many weights they hold, and what can't fit, under a limit
or on the disk, is refused before anything is built.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastdit.engine.sealed import DIGITS, MANIFEST, files_in
from fastdit.errors import EngineBuildFailed

#: What a directory keeps besides what is in use, unless a limit is set.
LIMIT_BYTES = 8 << 30

#: The names of entries. Nothing in a directory is touched that is not named by a digest.
ENTRIES = "[0-9a-f]" * DIGITS

#: What this process uses, by directory and digest, each as long as whatever uses it lives.
_USED: weakref.WeakValueDictionary[tuple[Path, str], object] = weakref.WeakValueDictionary()

#: What the engines of each model that runs in this process take, in bytes, by directory.
_REQUIRED: defaultdict[Path, weakref.WeakKeyDictionary[nn.Module, int]] = defaultdict(weakref.WeakKeyDictionary)


@dataclass(frozen=True)
class Requirement:
    """What the engines of a model take on the disk at least: their number, bytes in all, and those of the largest."""

    engines: int
    total: int
    largest: int


class Room:
    """The room of one directory. `limit` bounds all that is kept there, in bytes; None where none is set."""

    def __init__(self, directory: Path, limit: int | None) -> None:
        self._directory, self._limit = directory, limit
        self._required = _REQUIRED[directory]

    def hold(self, digest: str, user: object) -> None:
        """Let an entry stay for as long as `user` lives."""
        _USED[self._directory, digest] = user

    def require(self, model: nn.Module, need: Requirement) -> None:
        """Expect the engines of a model for as long as it lives. Raises `EngineBuildFailed` where they can't fit."""
        if need.total <= self._required.get(model, 0):
            return
        what = f"the {need.engines} engines of {type(model).__name__}, which hold its weights, take"
        self._refuse_above_limit(need.total, what)
        kept = sum(size_of(folder) for folder in self._directory.glob(ENTRIES))
        self._refuse_above_disk(need.total, need.largest, kept, what)
        self._required[model] = need.total

    def made(self, size: int, digest: str, *, building: bool = False) -> Iterator[Path]:
        """Give the entries that have to go, one by one, until one of `size` bytes fits under a digest.

        One that is skipped stays, and the next one goes for it. Raises `EngineBuildFailed`, before any goes, where the
        new one can't fit. With `building` it is first made on the disk of temporary files.
        """
        sizes = {folder: size_of(folder) for folder in self._directory.glob(ENTRIES) if folder.name != digest}
        used = [folder for folder in sizes if (self._directory, folder.name) in _USED]
        in_use = sum(map(sizes.pop, used))
        rest, scratch = sum(sizes.values()), size if building else 0
        self._refuse_above_limit(in_use + size, "this engine and those in use take")
        self._refuse_above_disk(size, scratch, rest, "this engine takes")
        bound = max(LIMIT_BYTES, sum(self._required.values())) if self._limit is None else self._limit - in_use - size
        for folder in sorted(sizes, key=last_used):
            if rest <= bound and not self._lacking(size, scratch):
                return
            yield folder
            rest -= 0 if folder.exists() else sizes[folder]

    def _refuse_above_limit(self, size: int, what: str) -> None:
        if self._limit is not None and size > self._limit:
            raise EngineBuildFailed(
                f"{what} {_said(size)} at least, and {self._directory} may hold {_said(self._limit)}; raise that limit "
                "(FASTDIT_CACHE_LIMIT, in GiB), or take an engine that leaves weights where they are, such as Compile()"
            )

    def _refuse_above_disk(self, size: int, scratch: int, removable: int, what: str) -> None:
        """Raise unless `size` bytes fit where what is removable goes, and `scratch` on the disk of temporary files."""
        if (lacking := self._lacking(size, scratch) - removable) > 0:
            raise EngineBuildFailed(
                f"{what} {_said(size)} at least, for which {_said(lacking)} are lacking on the disk of "
                f"{self._directory} or of {tempfile.gettempdir()}; make room there, give another directory, or take an "
                "engine that leaves weights where they are, such as Compile()"
            )

    def _lacking(self, size: int, scratch: int) -> int:
        """Say how many bytes there are too few of, on the disk that has the fewest."""
        place = next(path for path in (self._directory, *self._directory.parents) if path.exists())
        temporary = Path(tempfile.gettempdir())
        if place.stat().st_dev == temporary.stat().st_dev:
            return max(0, size + scratch - shutil.disk_usage(place).free)
        return max(0, size - shutil.disk_usage(place).free, scratch - shutil.disk_usage(temporary).free)


def size_of(folder: Path) -> int:
    """Add up the bytes of a folder's files."""
    return sum(path.lstat().st_size for path in files_in(folder).values())


def last_used(folder: Path) -> float:
    """Say when an entry was last used, in seconds since the epoch; 0 where it does not say."""
    manifest = folder / MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0


def _said(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"
