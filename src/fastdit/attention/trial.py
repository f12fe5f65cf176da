"""Whether a kernel is there for a model: a few tokens are attended to where the model is, and the answer is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastdit.blocks.attention import Attend, AttentionCall, first_line
from fastdit.process import unheard_warnings


class Target(NamedTuple):
    """Where attention will be computed, in which precision, and how large a head is."""

    device: torch.device
    dtype: torch.dtype
    head_size: int

    def __str__(self) -> str:
        return f"{self.device} in {self.dtype} with heads of {self.head_size}"


def target_of(pipeline: object, transformer: nn.Module) -> Target:
    """Say where a transformer will compute attention: what offloads it decides where, most of its weights how."""
    hook = transformer.__dict__.get("_hf_hook")
    own = next((weight.device for weight in transformer.parameters()), torch.device("cpu"))
    device = getattr(pipeline, "_execution_device", None) or getattr(hook, "execution_device", None) or own
    # Some weights are kept in another precision than the model computes in: a few in float32, or most of them packed.
    held = Counter({torch.float32: 0})
    for weight in transformer.parameters():
        if weight.is_floating_point() and weight.element_size() > 1:
            held[weight.dtype] += weight.numel()
    return Target(torch.device(device), held.most_common(1)[0][0], _head_size(transformer))


def failure_of(kernel: Callable[[], Attend], target: Target) -> str | None:
    """Attend to 32 tokens by the function that `kernel` gives; say why that failed, None where it did not."""
    device, dtype, head_size = target
    values = torch.linspace(-1.0, 1.0, 3 * 2 * 32 * head_size, device=device, dtype=torch.float32)
    query, key, value = values.view(3, 1, 2, 32, head_size)
    expected = ((query @ key.transpose(2, 3)) * head_size**-0.5).softmax(dim=3) @ value
    call = AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype))
    with unheard_warnings() as remarks, torch.no_grad():
        try:
            found = kernel()(call)
            right = found.shape == expected.shape and torch.allclose(found.float(), expected, atol=0.1)
        except Exception as error:
            return "; ".join([first_line(error), *map(first_line, remarks)])
    return None if right else "it runs there and gives something else than attention"


def _head_size(transformer: nn.Module) -> int:
    """Read the head size off the first attention module; 64, which every kernel has, where none says it."""
    for part in transformer.modules():
        heads, width = getattr(part, "heads", None), getattr(getattr(part, "to_q", None), "out_features", None)
        if isinstance(heads, int) and isinstance(width, int):
            return width // heads
    size = getattr(getattr(transformer, "config", None), "attention_head_dim", 64)
    return size if isinstance(size, int) else 64
