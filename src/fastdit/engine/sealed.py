"""A folder that is read only if it is as this user's fastdit wrote it: whole, unchanged, with nothing added.

    <folder>/manifest.json    what the folder holds, the SHA-256 of each of its files, and a seal
    <folder>/...              the files

The seal is an HMAC of the manifest under a secret of the user's, which lies elsewhere (`places.py`). Whatever is read
before the seal is known to hold may have been put there by anybody.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import TypedDict

from filelock import FileLock

from fastdit.engine.places import made_private, state_home
from fastdit.errors import InvalidConfig

MANIFEST = "manifest.json"

#: Hexadecimal digits of a folder's name.
DIGITS = 32

_VERSION = 3
_SECRET_BYTES = 32

#: The errors of a path that lead to something else than a file: not there, below a file, a link.
_MISPLACED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Manifest(TypedDict):
    """What is written of a folder."""

    fastdit_engine: int
    key: dict[str, str]
    files: dict[str, str]


class Unfit(Exception):
    """What is in a folder is not what fastdit wrote; the text says why."""


def digest_of(key: dict[str, str]) -> str:
    """Give the name of the folder that is kept under a key."""
    return _sha256(repr(sorted(key.items())).encode())[:DIGITS]


def files_in(folder: Path) -> dict[str, Path]:
    """Give the files of a folder by their paths in it, links and all."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def seal(folder: Path, key: dict[str, str]) -> None:
    """Write the manifest of a folder, under a key, in place of one that is there."""
    files = {name: _sha256(path.read_bytes()) for name, path in files_in(folder).items() if name != MANIFEST}
    manifest: Manifest = {"fastdit_engine": _VERSION, "key": key, "files": files}
    data = {"manifest": manifest, "seal": _seal_of(manifest, _secret())}
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def manifest_of(folder: Path) -> Manifest:
    """Read a folder's manifest. Raises `Unfit` unless it was written here by this user.

    Raises `InvalidConfig` where this user has no secret, and can have none.
    """
    secret = _secret()
    try:
        data = json.loads(_read(folder / MANIFEST))
        if not isinstance(data, dict) or set(data) != {"manifest", "seal"} or not isinstance(data["seal"], str):
            raise Unfit("its manifest is not one of fastdit's")
        if not hmac.compare_digest(data["seal"].encode(), _seal_of(data["manifest"], secret).encode()):
            raise Unfit("its manifest does not carry this user's seal")
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise Unfit(f"its manifest can't be read: {error}") from error
    manifest: Manifest = data["manifest"]
    if manifest["fastdit_engine"] != _VERSION:
        raise Unfit("it was written in another version")
    return manifest


def contents_of(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read a folder's files. Raises `Unfit` for one that is missing, added or changed."""
    listed, present = manifest["files"], files_in(folder)
    if odd := sorted(present.keys() - {MANIFEST} ^ listed.keys()):
        raise Unfit(f"{odd[0]} {'was put there later' if odd[0] in present else 'is missing'}")
    contents = {name: _read(present[name]) for name in listed}
    if changed := [name for name, content in contents.items() if _sha256(content) != listed[name]]:
        raise Unfit(f"{changed[0]} has changed")
    return contents


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    """Read a file that anybody may have put there. Raises `Unfit` where it is missing, or is no plain file.

    Raises `OSError` where it is this process that can't read it.
    """
    try:
        content = _plain_file(path)
    except OSError as error:
        if error.errno in _MISPLACED:
            raise Unfit(f"{path.name} can't be read: {error.strerror}") from error
        raise
    if content is None:
        raise Unfit(f"{path.name} is no plain file")
    return content[1]


def _plain_file(path: Path) -> tuple[os.stat_result, bytes] | None:
    """Give a file and its content without following a link or waiting for a pipe; None where it is no plain file."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return found, file.read()
    finally:
        os.close(descriptor)


def _seal_of(manifest: object, secret: bytes) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _secret() -> bytes:
    """Read the user's secret, made where there is none that nobody else can have seen or put there.

    Raises `InvalidConfig` where it can be neither read nor made.
    """
    try:
        path = made_private(state_home()) / "seal"
        if (kept := _kept_secret(path)) is not None:
            return kept
        with FileLock(path.with_suffix(".lock")):
            if (kept := _kept_secret(path)) is not None:
                return kept
            kept = secrets.token_bytes(_SECRET_BYTES)
            descriptor, name = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
            with os.fdopen(descriptor, "wb") as file:
                file.write(kept)
            os.replace(name, path)
            return kept
    except OSError as error:
        raise InvalidConfig(
            f"the secret that engines are sealed by can't be kept ({error}); set FASTDIT_STATE to a folder of your own"
        ) from error


def _kept_secret(path: Path) -> bytes | None:
    try:
        kept = _plain_file(path)
    except OSError as error:
        if error.errno in _MISPLACED:
            return None
        raise
    if kept is None:
        return None
    found, content = kept
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        return None
    return content if len(content) == _SECRET_BYTES else None
