"""The modulated input of a model's first block, which TeaCache watches: one small function a block class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Signal = Callable[[Any, torch.Tensor, tuple[Any, ...], Mapping[str, Any]], torch.Tensor]


def _adaptive_norm(block: Any, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """AdaLN-Zero as in FLUX: norm1(x, emb=temb) gives the modulated input first."""
    return block.norm1(hidden_states, emb=kwargs["temb"])[0]


MODULATED_SIGNALS: dict[str, Signal] = {"FluxTransformerBlock": _adaptive_norm}


def modulated_signal(block: Any) -> Signal | None:
    """Find the signal for a block (or a proxy of one) by its class."""
    names = [cls.__name__ for cls in block.__class__.__mro__]  # a stand-in for a block answers to its class
    return next((MODULATED_SIGNALS[name] for name in names if name in MODULATED_SIGNALS), None)
