"""A checksum of the values of weights, by a sample of each: without a run of their module, one transfer a device."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

#: How many elements of every weight its checksum looks at.
SAMPLES = 64
_GOLDEN = 0.618


def weights_of(module: nn.Module) -> str:
    """Give a checksum of the values of a module's weights, by a sample of each: cheap enough for every run.

    It looks at 64 elements of every weight, evenly spread, so it sees whatever changes a weight as a whole (another
    checkpoint, a LoRA that is fused, scaled or unfused in place), and may miss an edit of a few elements by hand.
    """
    return sampled([*module.parameters(), *module.buffers()])


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Give 64 elements of a tensor, or about as many, spread over its rows and columns; a view where that can be."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    step, width = max(1, tensor.numel() // SAMPLES), tensor.shape[-1] if tensor.dim() > 1 else tensor.numel()
    if step >= width > 1:
        # Whole rows further would be the same column again; a golden part of a row further, all get their turn.
        further = next(part for part in itertools.count(round(_GOLDEN * width)) if math.gcd(part, width) == 1)
        step += further - step % width
    return tensor.reshape(-1)[::step]


def parts_of(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], object]:
    """Give the tensors that a tensor of a class of its own holds (packed values, scales), by name, and how it reads
    them; none for one that is plain, or that does not say."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return {}, None
    names, how = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, how


def sampled(tensors: Iterable[torch.Tensor]) -> str:
    """Give the checksum of tensors by a sample of each."""
    with torch.no_grad():
        plain = [part for tensor in tensors for part in _unpacked(tensor.detach())]
        picked = [sample_of(tensor) for tensor in plain if tensor.numel() and tensor.device.type != "meta"]
        digest = hashlib.sha256()
        for device in dict.fromkeys(tensor.device for tensor in picked):
            # One transfer for all the weights of a device.
            together = torch.cat([tensor.double() for tensor in picked if tensor.device == device])
            digest.update(together.cpu().numpy().tobytes())
    return digest.hexdigest()


def _unpacked(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    held, _ = parts_of(tensor)
    if not held:
        yield tensor
    for part in held.values():
        yield from _unpacked(part)
