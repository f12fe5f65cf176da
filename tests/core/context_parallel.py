"""One rank of a run under context parallelism; `test_context_parallel.py` starts one process a rank."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig

import fastdit
from fastdit.step_cache import decision
from fastdit.testing import generate, tiny_flux


def share_sequence(transformer: Any, ranks: int) -> None:
    """What `enable_parallelism` does, which asks for an accelerator, on a CPU."""
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ranks))
    context = config.context_parallel_config
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", mesh_shape=context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config.setup(dist.get_rank(), ranks, torch.device("cpu"), mesh=mesh)
    transformer._parallel_config = config
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(transformer, context, transformer._cp_plan)


def main(rank: int, ranks: int, stack: str, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    pipeline, call = tiny_flux()
    if ranks > 1:
        share_sequence(pipeline.transformer, ranks)
    fast = fastdit.accelerate(pipeline, fastdit.Stack.from_json(json.loads(stack)))
    generate(fast, call)
    own: list[list[float]] = []
    read = decision.Decider._read

    def noted(self: Any, changes: list[torch.Tensor]) -> list[float]:
        own.extend(change.tolist() for change in changes)
        return read(self, changes)

    decision.Decider._read = noted
    latents = generate(fast, call)
    actions = [step.action for step in fast.fastdit.last_run.steps]
    torch.save({"latents": latents, "actions": actions, "signals": own}, f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
