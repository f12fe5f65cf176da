"""One rank of a run under context parallelism; started by `test_context_parallel.py`, twice at a time."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import fastdit
from fastdit.testing import generate, tiny_flux


def record(fast: Any) -> list[str]:
    return [step.action for step in fast.fastdit.last_run.steps]


def main(rank: int, ranks: int, stack: str, out: str) -> None:
    from diffusers import ContextParallelConfig

    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    pipeline, call = tiny_flux()
    if ranks > 1:
        pipeline.transformer.set_attention_backend("native")
        pipeline.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    fast = fastdit.accelerate(pipeline, fastdit.Stack.from_json(json.loads(stack)))
    first = generate(fast, call)
    latents = generate(fast, call)
    torch.save({"latents": latents, "first": first, "actions": record(fast)}, f"{out}/{ranks}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
