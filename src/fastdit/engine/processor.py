"""What compiled code computes in another way on a CPU: GELU, attention by heads where that is faster, packed layers.

    gelu(x) = x / 2 (1 + tanh(u(x))) = x sigmoid(2 u(x)),    u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

The two forms of GELU are equal, and a vector of tanh costs three times what one of exp does. For attention see
`by_heads.py`: which way is faster depends on the processor, the precision and the size, so both are timed on
the attention calls that the piece makes, once for each shape in a process. What was found is kept with the engine.
For linear layers with packed weights see `packed.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastdit.blocks.attention import AttentionCall, KernelMode
from fastdit.engine.base import Engine
from fastdit.engine.by_heads import attend_by_heads, takes
from fastdit.engine.inductor import WRITTEN
from fastdit.engine.key import Environment
from fastdit.engine.packed import packed_linear, packs
from fastdit.engine.piece import PieceCall

_FILE = "attention.json"

#: By this factor heads must be faster, so that a tie is torch's.
_GAIN = 1.1
_REPEATS = 5

#: The precision of a call of attention, and the shapes of its query, key and value.
_Outline = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: What was timed in this process: the outline of a call and the number of threads -> whether heads won.
_TIMED: dict[tuple[_Outline, int], bool] = {}


@dataclasses.dataclass(frozen=True)
class ProcessorEngine(Engine):
    """Base of the engines that compile torch's own operations, and on a CPU exchange some of them.

    Args:
        attention: "fastest" takes, on a CPU and for calls without a mask, the faster one of torch's kernel and a few
            heads at a time; "torch" leaves it to torch. A kernel of the stack's own goes before both.
    """

    _: dataclasses.KW_ONLY
    attention: Literal["fastest", "torch"] = "fastest"

    def environment(self, device: torch.device) -> Environment:
        import torch._dynamo.config
        import torch._functorch.config
        import torch._inductor.config

        compilers: tuple[Any, ...] = torch._dynamo.config, torch._functorch.config, torch._inductor.config
        settings = tuple(_portable(one, one.get_hash()) for one in compilers)
        return *super().environment(device), ("compilers", (torch._dynamo.eval_frame._stance.stance, *settings))

    def tracing(
        self, call: PieceCall, folder: Path, *, shapes: int = 1, packed: bool = False
    ) -> Callable[[], AbstractContextManager[object]]:
        """Give what a piece is traced under. What is chosen for its attention is written to `folder`, or read there.

        A piece of several `shapes` has torch's attention, since what is faster depends on the shape.
        Where `packed`, linear layers have their weights packed. Weights that answer torch's functions themselves, as
        GGUF's do, are left alone: Dynamo can't trace the two together.
        """
        if call.device.type != "cpu" or any(map(_answers, call.module.parameters())):
            return nullcontext
        by_heads: frozenset[_Outline] = frozenset()
        if self.attention == "fastest" and not call.attention and shapes == 1:
            if not (folder / _FILE).exists():
                (folder / _FILE).write_text(json.dumps(_faster_by_heads(call)), encoding="utf-8")
            kept = json.loads((folder / _FILE).read_bytes())
            by_heads = frozenset((dtype, tuple(q), tuple(k), tuple(v)) for dtype, q, k, v in kept)
        return lambda: _OnProcessor(by_heads, packed=packed)


class _OnProcessor(TorchFunctionMode):
    """Answers GELU, the attention calls of some outlines, and linear layers where asked, while a piece is traced."""

    def __init__(self, by_heads: frozenset[_Outline], *, packed: bool) -> None:
        super().__init__()
        self._by_heads, self._packed = by_heads, packed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            return args[0].unflatten(*args[1:], **kwargs)  # see KernelMode
        if func is nn.functional.gelu and kwargs.get("approximate") == "tanh":
            return _gelu(*args)
        if func is nn.functional.linear and self._packed and packs(*args[:2]):
            return packed_linear(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention and self._by_heads:
            call = AttentionCall(*args, **kwargs)
            if call.query.dim() == 4 and takes(call) and _outline(call) in self._by_heads:
                return attend_by_heads(call)
        return func(*args, **kwargs)


@lru_cache(maxsize=64)
def _portable(config: Any, _now: bytes) -> str:
    """Digest a compiler's settings as they are now, but for folders, which differ by where a process was started."""
    kept = []
    for name, value in sorted(config.get_config_copy().items()):
        if isinstance(value, (set, frozenset)):
            value = sorted(map(repr, value))  # their own order is another one in every process
        if name not in WRITTEN and not (isinstance(value, str) and os.path.isabs(value)):
            kept.append((name, value))
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def _answers(weight: torch.Tensor) -> bool:
    """Whether a weight is of a class that answers torch's functions in a way of its own."""
    return type(weight).__torch_function__ not in (nn.Parameter.__torch_function__, torch.Tensor.__torch_function__)


def _gelu(values: torch.Tensor) -> torch.Tensor:
    exact = values.float()
    inner = math.sqrt(2.0 / math.pi) * (exact + 0.044715 * exact * exact * exact)
    return (exact * torch.sigmoid(2.0 * inner)).to(values.dtype)


def _faster_by_heads(call: PieceCall) -> list[_Outline]:
    """Run a piece and time its attention calls both ways; give the outlines of those that are faster by heads."""
    faster: dict[_Outline, None] = {}

    def attend(asked: AttentionCall) -> torch.Tensor:
        if takes(asked):
            outline = _outline(asked)
            timed = outline, torch.get_num_threads()
            if timed not in _TIMED:
                _TIMED[timed] = _GAIN * _seconds(attend_by_heads, asked) < _seconds(AttentionCall.by_torch, asked)
            if _TIMED[timed]:
                faster[outline] = None
        return asked.by_torch()

    with KernelMode(attend, "the trial of attention by heads"):
        call.run()
    return list(faster)


def _seconds(attend: Callable[[AttentionCall], torch.Tensor], call: AttentionCall) -> float:
    """Give the least of a few timings; what disturbs one only adds to it."""
    attend(call)
    timings = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        attend(call)
        timings.append(time.perf_counter() - start)
    return min(timings)


def _outline(call: AttentionCall) -> _Outline:
    return str(call.query.dtype), tuple(call.query.shape), tuple(call.key.shape), tuple(call.value.shape)
