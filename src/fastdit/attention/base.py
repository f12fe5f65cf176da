"""What every accelerator of the attention level is: a kernel that answers the model's calls of torch's attention.

While a forward runs, calls of `scaled_dot_product_attention` are answered by the kernel of the run's stage. A torch
function mode sees them, which belongs to the thread and to that forward: nothing is written to a module, a processor
or a registry of the process, so no other model can follow. Compiled blocks are compiled again under it, as for any
change of what they call, and what else watches attention (a token cache's scores) sees the calls as ever.

Whether a kernel is there is found out by trying it (`trial.py`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fastdit.accelerator import Accelerator, Break, Change, Effects, Level, Need
from fastdit.attention.trial import Target, failure_of, target_of
from fastdit.blocks.attention import Attend, KernelMode
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

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        target = target_of(pipeline, transformer)
        for backend in dict.fromkeys(self.backends):
            if backend != NATIVE and (reason := failure_of(partial(self.kernel, backend), target)):
                raise UnsupportedModel(
                    f"{self.describe()}: the attention backend {backend!r} can't be used for "
                    f"{type(transformer).__name__} on {target}: {reason}; {self._remedy(target)}"
                )

    def _remedy(self, target: Target) -> str:
        working = [name for name in self.alternatives() if failure_of(partial(self.kernel, name), target) is None]
        cpu = target.device.type == "cpu"
        moved = "move the model to the device it will run on first" if cpu else "change its precision"
        return (f"take one that works there ({', '.join(working)}), or " if working else "") + moved

    def enter(self, run: Run, lasting: None) -> Pass | None:
        return None if self.neutral else AttentionPass(self)


class AttentionPass(Pass):
    """A kernel in one run: it answers the attention of every forward, as its stage asks."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self._kernel = kernel
        self._forwards = self._answered = 0

    def forward(self, call: ForwardCall, next: Forward) -> object:
        kernel, backend = self._kernel, self._kernel.backend_in(call.step.stage)
        if backend == NATIVE:
            self._forwards += 1
            return next(call)
        name = f"{kernel.describe()}: the attention backend {backend!r}"
        with KernelMode(kernel.kernel(backend), name, f"{type(kernel).__name__} {backend}") as mode:
            output = next(call)
        self._forwards += 1
        self._answered += mode.answered
        return output

    def idle(self) -> str | None:
        if self._answered or not self._forwards:
            return None
        return (
            f"{self._kernel.describe()} answered no call of attention in the run: the model's attention does not call "
            "torch's scaled_dot_product_attention; set another attention processor, or leave it out"
        )
