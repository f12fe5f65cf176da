"""The folder in which a process works on engines. It goes when the process does, or when the next one finds it left.

    <temporary files>/fastdit-engines-<letters>/lock     held as long as the process lives
    <temporary files>/fastdit-engines-<letters>/...      its work

A process that is killed takes nothing away, and an engine may hold a copy of a model's weights. Whether the owner lives
is told by the lock, which the system lets go with the process, never by a number.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "fastdit-engines-", "lock"

#: What keeps the folder as long as the process.
_HELD: list[object] = []


@cache
def scratch() -> Path:
    """Give this process's folder, made at first use; what others left behind is removed then."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(Timeout, OSError), FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    while True:
        folder = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
        lock = FileLock(Path(folder.name) / _LOCK)
        lock.acquire()
        # Another process may have found the folder before it was held, and taken it away.
        if (Path(folder.name) / _LOCK).exists():
            _HELD.extend((folder, lock))
            return Path(folder.name)
