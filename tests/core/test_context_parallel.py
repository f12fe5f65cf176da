"""Ranks that share one sequence decide together: two processes against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit import (
    FirstBlockCache,
    Stack,
    Taylor,
    TeaCache,
)

RANK = Path(__file__).parent / "context_parallel.py"
CACHES = [FirstBlockCache(0.8), TeaCache(0.6, (1.0, 0.0), forecast=Taylor(1))]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(ranks: int, stack: Stack, folder: Path) -> list[dict[str, Any]]:
    """Run a stack under that many ranks; give each one's latents and actions."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(ranks), json.dumps(stack.to_json()), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: type(cache).__name__)
def test_two_ranks_decide_as_one_process_does_and_give_its_picture(cache: Any, tmp_path: Path) -> None:
    (alone,) = run(1, Stack([cache]), tmp_path)
    first, second = run(2, Stack([cache]), tmp_path)
    assert first["actions"] == second["actions"] == alone["actions"]
    assert set(alone["actions"]) > {"computed"}
    assert torch.equal(first["latents"], second["latents"])
    torch.testing.assert_close(first["latents"], alone["latents"], rtol=1e-3, atol=1e-4)
    # Each rank alone sees other changes than all of them together, so without the sum they could part.
    assert first["signals"] != second["signals"]
