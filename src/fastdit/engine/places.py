"""Where fastdit keeps things, and whether a folder is its user's alone.

    cache    engines, which may be large           $FASTDIT_CACHE, or `fastdit` in $XDG_CACHE_HOME or ~/.cache
    state    the secret that they are sealed by    $FASTDIT_STATE, or `fastdit` in $XDG_STATE_HOME or ~/.local/state

$FASTDIT_CACHE_LIMIT bounds what is kept of engines, in GiB.

Who can write to the state folder decides which code is loaded; who can write to the cache does not (`sealed.py`).
"""

from __future__ import annotations

import math
import os
import stat
from contextlib import suppress
from pathlib import Path

from fastdit.errors import InvalidConfig

#: The mode of a folder of the user's own.
_PRIVATE = stat.S_IRWXU

#: Whom root's folders belong to, seen from a container that has no root of the machine's.
_UNMAPPED = 65534


def cache_home() -> Path:
    """Give fastdit's cache folder. Raises `InvalidConfig` where the user has no home."""
    return _home("FASTDIT_CACHE", "XDG_CACHE_HOME", "~/.cache")


def state_home() -> Path:
    """Give fastdit's state folder. Raises `InvalidConfig` where the user has no home."""
    return _home("FASTDIT_STATE", "XDG_STATE_HOME", "~/.local/state")


def cache_limit() -> int | None:
    """Give the limit that is set on kept engines, in bytes; None where there is none.

    Raises `InvalidConfig` for what is no number of GiB above 0.
    """
    given = os.environ.get("FASTDIT_CACHE_LIMIT")
    if not given:
        return None
    try:
        gibibytes = float(given)
    except ValueError:
        gibibytes = math.nan
    if not 0 < gibibytes < math.inf:
        raise InvalidConfig(f"FASTDIT_CACHE_LIMIT is a number of GiB above 0, such as 40, got {given!r}")
    return int(gibibytes * (1 << 30))


def _home(own: str, base: str, default: str) -> Path:
    given = os.environ.get(own)
    path = Path(given) if given else Path(os.environ.get(base) or default) / "fastdit"
    return expanded(path, f"set {own} to a folder of your own")


def expanded(path: Path, remedy: str) -> Path:
    """Give a path in full. Raises `InvalidConfig`, which says the `remedy`, where it is in a home that is not there."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise InvalidConfig(f"{path} is in no home folder ({error}); {remedy}") from error


def made(folder: Path) -> Path:
    """Make a folder and those around it that are missing, for the user alone whatever the umask."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            path.mkdir(_PRIVATE)
            path.chmod(_PRIVATE)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    return folder


def made_private(folder: Path) -> Path:
    """Make a folder that nobody else reads or writes. Raises `InvalidConfig` where others can write to it already."""
    if (why := others_write(made(folder))) is not None:
        raise InvalidConfig(f"{why}; set FASTDIT_STATE to a folder of your own")
    if stat.S_IMODE(folder.stat().st_mode) != _PRIVATE:
        folder.chmod(_PRIVATE)
    return folder


def others_write(folder: Path) -> str | None:
    """Say how another user could put something into a folder, or another one in its place; None where none can."""
    if not hasattr(os, "getuid"):  # no such system of users and modes
        return None
    own = folder, folder.resolve()  # what it is called, and where a link on the way leads
    for path in dict.fromkeys(each for one in own for each in (one, *one.parents) if each.exists()):
        found, within = path.stat(), path in own
        if found.st_uid not in (os.getuid(), 0) and (within or found.st_uid != _UNMAPPED):
            return f"{path} belongs to another user"
        if found.st_mode & stat.S_IWOTH and (within or not found.st_mode & stat.S_ISVTX):
            return f"everybody can write to {path}"
        if within and found.st_mode & stat.S_IWGRP and not _own_group(found.st_gid):
            return f"a group of users can write to {path}"
    return None


def _own_group(group: int) -> bool:
    """Whether a group is the one that many systems give to each user, with nobody else in it."""
    import grp
    import pwd

    with suppress(KeyError):
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
        return user.pw_gid == group and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}
    return False
