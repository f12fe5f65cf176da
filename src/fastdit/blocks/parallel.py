"""A sequence that several ranks share: diffusers' context parallelism, as decisions and checks must know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdit.nested import Value


def sequence_group(module: nn.Module) -> Value:
    """Give the process group of diffusers' context parallelism on this module, or None."""
    parallel: Any = getattr(module, "_parallel_config", None)
    context = getattr(parallel, "context_parallel_config", None)
    mesh: Any = getattr(context, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def rank_sum(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Give what adds a tensor up over the ranks that share the module's sequence; as it is where nothing is shared."""
    group = sequence_group(module)
    if group is None:
        return lambda tensor: tensor

    def add(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor, group=group)
        return tensor

    return add
