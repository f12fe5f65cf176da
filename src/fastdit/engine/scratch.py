"""The folder in which a process works on engines. It goes when the process does, or when the next one finds it left.

    <temporary files>/fastdit-engines-<letters>/    made for its user alone, held as long as the process lives

A process that is killed takes nothing away, and an engine may hold a copy of a model's weights. Whether the owner lives
is told by a lock on the folder itself, which the system lets go with the process, never by a number or a file in it.
Folders of other users are never opened, links never followed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from fastdit.engine.sealed import files_in

_PREFIX = "fastdit-engines-"


def scratch() -> Path:
    """Give this process's folder, made at first use; what others left behind is removed then."""
    return _of_process(os.getpid())  # a forked child has its own


@cache
def _of_process(process: int) -> Path:
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if (held := _hold(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        held = _hold(folder)
        # Another process may have found the folder before it was held, and taken it away.
        if folder.exists() and (held is not None or sys.platform == "win32"):
            atexit.register(remove, folder, process)
            return folder


def remove(folder: Path, process: int) -> None:
    """Remove a folder in a process's scratch, or all of it, unless this is a fork of the process."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Say of the files of a folder what tells that one was written."""
    return {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in files_in(folder).items()}


def _hold(folder: Path) -> int | None:
    """Lock a folder of the user's own until what is given is closed, or the process ends; None where that can't be."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(opened).st_uid == os.getuid():
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
    except OSError:
        pass
    os.close(opened)
    return None
