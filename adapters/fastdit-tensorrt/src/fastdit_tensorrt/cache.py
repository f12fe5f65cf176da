"""Where torch-tensorrt keeps engines without weights, for refitting: in fastdit's registry, sealed.

torch-tensorrt finds an engine by the operations of its graph in order and the shapes of its inputs. Graphs that differ
in a constant or in the order of operands have one name there. So every piece has a cache of its own, under a
fingerprint of all that makes it but its weights. What is kept is a pickle, which must be this user's own.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdit.engine.registry import Registry
from fastdit.engine.sealed import digest_of

_FILE = "engine.bin"


@dataclass(frozen=True)
class CacheKey:
    """What a cached engine is found by: the class and fingerprint of its piece, torch-tensorrt's name for the graph."""

    piece: str
    fingerprint: str
    graph: str

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, str]:
        return {
            "engine": "TensorRT",
            "piece": f"{self.piece} without weights",
            "fingerprint": self.fingerprint,
            "graph": self.graph,
        }


class SealedEngines:
    """The bytes of the engines of one piece."""

    def __init__(self, directory: str | None, piece: str, fingerprint: str) -> None:
        self._registry, self._piece, self._fingerprint = Registry(directory), piece, fingerprint

    def save(self, hash: str, blob: bytes, *args: object, **kwargs: object) -> None:
        """Keep an engine under torch-tensorrt's name for it."""
        key = CacheKey(self._piece, self._fingerprint, hash)
        with tempfile.TemporaryDirectory() as folder, self._registry.locked(key):
            Path(folder, _FILE).write_bytes(blob)
            self._registry.keep(key, Path(folder))

    def load(self, hash: str, *args: object, **kwargs: object) -> bytes | None:
        """Give an engine as it was kept; None where there is none, or it is not as it was written."""
        key = CacheKey(self._piece, self._fingerprint, hash)
        with tempfile.TemporaryDirectory() as folder, self._registry.locked(key):
            return Path(folder, _FILE).read_bytes() if self._registry.read(key, Path(folder)) else None


def sealed_cache(directory: str | None, piece: str, fingerprint: str) -> Any:
    """Make the cache of one piece, as torch-tensorrt takes it."""
    from torch_tensorrt.dynamo._engine_cache import BaseEngineCache

    return type("SealedEngineCache", (SealedEngines, BaseEngineCache), {})(directory, piece, fingerprint)
