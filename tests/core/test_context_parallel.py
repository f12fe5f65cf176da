"""Ranks that share one sequence decide together: two processes against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import context_parallel
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Run every stack in two processes that share the sequence; give what each had of each stack."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    stacks = json.dumps([Stack([cache]).to_json() for cache in CACHES])
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), "2", stacks, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.exhaustive
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("place", range(len(CACHES)), ids=[type(cache).__name__ for cache in CACHES])
def test_two_ranks_decide_as_one_process_does_and_give_its_picture(
    place: int, ranks: list[list[dict[str, Any]]]
) -> None:
    alone = context_parallel.run(Stack([CACHES[place]]))
    first, second = (found[place] for found in ranks)
    assert first["actions"] == second["actions"] == alone["actions"]
    assert set(alone["actions"]) > {"computed"}
    assert torch.equal(first["latents"], second["latents"])
    torch.testing.assert_close(first["latents"], alone["latents"], rtol=1e-3, atol=1e-4)
    # Each rank alone sees other changes than all of them together, so without the sum they could part.
    assert first["signals"] != second["signals"]
