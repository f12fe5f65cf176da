"""A folder that is read only if it is as this user's fastdit wrote it: whole, unchanged, with nothing added.

    <folder>/manifest.json    what the folder holds, the SHA-256 of each of its files, and a seal
    <folder>/...              the files

The seal is an HMAC of the manifest under a secret of the user's, which lies in fastdit's cache folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import TypedDict

from filelock import FileLock

MANIFEST = "manifest.json"

#: Hexadecimal digits of a folder's name.
DIGITS = 32

_VERSION = 2
_SECRET_BYTES = 32


class Manifest(TypedDict):
    """What is written of a folder."""

    fastdit_engine: int
    key: dict[str, str]
    files: dict[str, str]


class Unfit(Exception):
    """What is in a folder is not what fastdit wrote; the text says why."""


def cache_home() -> Path:
    """Give fastdit's cache folder: $FASTDIT_CACHE, or `fastdit` in $XDG_CACHE_HOME, or ~/.cache/fastdit."""
    if own := os.environ.get("FASTDIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdit"


def digest_of(key: dict[str, str]) -> str:
    """Give the name of the folder that is kept under a key."""
    return _sha256(repr(sorted(key.items())).encode())[:DIGITS]


def files_in(folder: Path) -> dict[str, Path]:
    """Give the files of a folder by their paths in it, links and all."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def seal(folder: Path, key: dict[str, str]) -> None:
    """Write the manifest of a folder, under a key."""
    files = {name: _sha256(path.read_bytes()) for name, path in files_in(folder).items()}
    manifest: Manifest = {"fastdit_engine": _VERSION, "key": key, "files": files}
    data = {"manifest": manifest, "seal": _seal_of(manifest)}
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def manifest_of(folder: Path) -> Manifest:
    """Read a folder's manifest. Raises `Unfit` unless it was written here by this user."""
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise Unfit(f"its manifest can't be read: {error}") from error
    if not isinstance(data, dict) or set(data) != {"manifest", "seal"} or not isinstance(data["seal"], str):
        raise Unfit("its manifest is not one of fastdit's")
    if not hmac.compare_digest(data["seal"].encode(), _seal_of(data["manifest"]).encode()):
        raise Unfit("its manifest does not carry this user's seal")
    manifest: Manifest = data["manifest"]
    if manifest["fastdit_engine"] != _VERSION:
        raise Unfit("it was written in another version")
    return manifest


def contents_of(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read a folder's files. Raises `Unfit` for one that is missing, added or changed."""
    listed, present = manifest["files"], files_in(folder)
    if odd := sorted(present.keys() - {MANIFEST} ^ listed.keys()):
        raise Unfit(f"{odd[0]} {'was put there later' if odd[0] in present else 'is missing'}")
    contents = {name: present[name].read_bytes() for name in listed}
    if changed := [name for name, content in contents.items() if _sha256(content) != listed[name]]:
        raise Unfit(f"{changed[0]} has changed")
    return contents


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _seal_of(manifest: object) -> str:
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
