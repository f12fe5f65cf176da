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


def run(stack: fastdit.Stack, ranks: int = 1) -> dict[str, Any]:
    """Run a stack; give its latents, its actions and the signals that this rank alone saw."""
    pipeline, call = tiny_flux()
    if ranks > 1:
        share_sequence(pipeline.transformer, ranks)
    fast = fastdit.accelerate(pipeline, stack)
    generate(fast, call)
    own: list[list[float]] = []
    read = decision.Decider._read

    def noted(self: Any, changes: list[torch.Tensor]) -> list[float]:
        own.extend(change.tolist() for change in changes)
        return read(self, changes)

    decision.Decider._read = noted
    try:
        latents = generate(fast, call)
    finally:
        decision.Decider._read = read
    actions = [step.action for step in fast.fastdit.last_run.steps]
    return {"latents": latents, "actions": actions, "signals": own}


def main(rank: int, ranks: int, stacks: str, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = [run(fastdit.Stack.from_json(stack), ranks) for stack in json.loads(stacks)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
