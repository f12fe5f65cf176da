"""What every accelerator of the attention level is: a kernel that answers the model's calls of torch's attention.

While a forward runs, calls of `scaled_dot_product_attention` are answered by the kernel of the run's stage. A torch
function mode sees them, which belongs to the thread and to that forward: nothing is written to a module, a processor
or a registry of the process, so no other model can follow. Compiled blocks are compiled again under it, as for any
change of what they call, and what else watches attention (a token cache's scores) sees the calls as ever.

Whether a kernel is there is decided by attending to a few tokens on the model's device, in its precision and head size.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastdit.accelerator import (
    Accelerator,
    Break,
    Change,
    Effects,
    Level,
    Need,
)
from fastdit.blocks.attention import Attend, AttentionCall, KernelMode, first_line
from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.errors import InvalidConfig, UnsupportedModel

if TYPE_CHECKING:
    from fastdit.run import Run


#: The backend that is the model's own: torch chooses among its kernels.
NATIVE = "native"


@dataclasses.dataclass(frozen=True)
class AttentionKernel(Accelerator):
    """Base of the accelerators that decide which kernel computes attention, for the run or for each stage."""

    level: ClassVar[Level] = Level.ATTENTION
    changes: ClassVar[frozenset[Change]] = frozenset({Change.ARITHMETIC_ORDER})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PLAIN_ATTENTION})
    breaks: ClassVar[frozenset[Break]] = frozenset({Break.BIT_EXACTNESS})

    @property
    def backends(self) -> tuple[str, ...]:
        """The kernels by name: one for the whole run, or one a stage."""
        raise NotImplementedError

    def kernel(self, backend: str) -> Attend:
        """Give the function that computes attention with a backend. It and this may raise anything where they can't."""
        raise NotImplementedError

    def alternatives(self) -> tuple[str, ...]:
        """Name the backends that could stand in where one is refused."""
        return ()

    @property
    def effects(self) -> Effects:
        return Effects(needs=self.needs) if self.neutral else super().effects

    @property
    def neutral(self) -> bool:
        return all(backend == NATIVE for backend in self.backends)

    def backend_in(self, stage: int) -> str:
        """Name the backend of a stage."""
        return self.backends[stage] if len(self.backends) > 1 else self.backends[0]

    def check_stages(self, stages: int) -> None:
        """Raise `InvalidConfig` where the backends are one a stage and a run has another number of stages."""
        if len(self.backends) not in (1, stages):
            raise InvalidConfig(
                f"{self.describe()} names {len(self.backends)} backends, and the run has {stages} "
                f"stage{'s' if stages > 1 else ''}; name one, or one for each stage of a schedule"
            )

    def check(self, pipeline: Any, transformer: Any) -> None:
        device, dtype, head_size = _target(pipeline, transformer)
        for backend in dict.fromkeys(self.backends):
            if backend != NATIVE and (reason := self.trial(backend, device, dtype, head_size)):
                raise UnsupportedModel(
                    f"{self.describe()}: the attention backend {backend!r} can't be used for "
                    f"{type(transformer).__name__} on {device} in {dtype} with heads of {head_size}: {reason}; "
                    f"{self._remedy(device, dtype, head_size)}"
                )

    def trial(self, backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Attend to a few tokens for real; give the reason for which that failed, None where it did not."""
        values = torch.linspace(-1.0, 1.0, 3 * 2 * 32 * head_size, device=device, dtype=torch.float32)
        query, key, value = values.view(3, 1, 2, 32, head_size)
        expected = ((query @ key.transpose(2, 3)) * head_size**-0.5).softmax(dim=3) @ value
        call = AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype))
        with warnings.catch_warnings(record=True) as remarks, torch.no_grad():
            warnings.simplefilter("always")
            try:
                found = self.kernel(backend)(call)
                right = found.shape == expected.shape and torch.allclose(found.float(), expected, atol=0.1)
            except Exception as error:
                return "; ".join([first_line(error), *(first_line(remark.message) for remark in remarks)])
        return None if right else "it runs there and gives something else than attention"

    def _remedy(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
        working = [name for name in self.alternatives() if self.trial(name, device, dtype, head_size) is None]
        moved = "move the model to the device it will run on first" if device.type == "cpu" else "change its precision"
        return (f"take one that works there ({', '.join(working)}), or " if working else "") + moved

    def enter(self, run: Run, lasting: None) -> Pass | None:
        return None if self.neutral else AttentionPass(self)


class AttentionPass(Pass):
    """A kernel in one run: it answers the attention of every forward, as its stage asks."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self._kernel = kernel
        self._forwards = self._answered = 0

    def forward(self, call: ForwardCall, next: Forward) -> Any:
        kernel, backend = self._kernel, self._kernel.backend_in(call.step.stage)
        self._forwards += 1
        if backend == NATIVE:
            return next(call)
        name = f"{kernel.describe()}: the attention backend {backend!r}"
        with KernelMode(kernel.kernel(backend), name, f"{type(kernel).__name__} {backend}") as mode:
            output = next(call)
        self._answered += mode.answered
        return output

    def idle(self) -> str | None:
        if self._answered or not self._forwards:
            return None
        return (
            f"{self._kernel.describe()} answered no call of attention in the run: the model's attention does not call "
            "torch's scaled_dot_product_attention; set another attention processor, or leave it out"
        )


def _target(pipeline: Any, transformer: nn.Module) -> tuple[torch.device, torch.dtype, int]:
    """Say where a transformer will run, in which precision, and how large its heads are."""
    hook: Any = transformer.__dict__.get("_hf_hook")
    own = next((weight.device for weight in transformer.parameters()), torch.device("cpu"))
    device = getattr(pipeline, "_execution_device", None) or getattr(hook, "execution_device", None) or own
    # Some weights are kept in another precision than the model computes in: a few in float32, or most of them packed.
    held = Counter({torch.float32: 0})
    for weight in transformer.parameters():
        if weight.is_floating_point() and weight.element_size() > 1:
            held[weight.dtype] += weight.numel()
    return torch.device(device), held.most_common(1)[0][0], _head_size(transformer)


def _head_size(transformer: nn.Module) -> int:
    """Read the head size off the first attention module; 64, which every kernel has, where none says it."""
    for part in transformer.modules():
        heads, query = getattr(part, "heads", None), getattr(part, "to_q", None)
        if isinstance(heads, int) and isinstance(getattr(query, "out_features", None), int):
            return int(query.out_features) // heads  # type: ignore[union-attr]
    size = getattr(getattr(transformer, "config", None), "attention_head_dim", 64)
    return size if isinstance(size, int) else 64
