"""An engine in one run: it answers the calls of the blocks that the other levels let run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from torch import nn

from fastdit.blocks.attention import KernelMode
from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.engine.arguments import in_canonical_strides
from fastdit.engine.piece import PieceCall
from fastdit.engine.refusals import Admission, answering_kernel, refuse_gradients
from fastdit.engine.workshop import Workshop
from fastdit.errors import EngineMismatch
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.structure import structural_twin


class EnginePass(Pass):
    """Runs each block that is called by its engine, which the workshop builds at the first call of its shape."""

    def __init__(self, workshop: Workshop, run: Run) -> None:
        self._workshop, self._run = workshop, run
        self._admitted: dict[int, Admission] = {}
        self._met: set[nn.Module] = set()
        self._kernel: KernelMode | None = None
        self._surroundings: int | None = None
        self._stage: tuple[Hashable, ...] | None = None
        self._called = self._aside = False
        self._ran = self._eager = 0
        self._in_run: Counter[str] = Counter()

    def forward(self, call: ForwardCall, next: Forward) -> object:
        self._kernel, self._aside = None, False
        try:
            self._kernel = answering_kernel()
        except EngineMismatch as error:
            self._workshop.excuse(call.name, error)
            self._aside = True
        if call.module not in self._met:
            self._met.add(call.module)
            stages = () if self._run.plan is None else self._run.plan.stages
            self._workshop.expect(call.module, len({(stage.layout, stage.tokens) for stage in stages}) or 1)
        self._stage, self._surroundings = _stage_of(self._run), None
        self._called, self._ran, self._eager = True, 0, 0
        output = next(call)
        self._in_run["forwards"] += 1  # one that failed says nothing of the engine's use
        return output

    def outcome(self) -> Outcome:
        """Name what ran the forward's blocks: the engine, "eager", both with their shares, or "none" if none ran."""
        engine, ran, eager = type(self._workshop.engine).__name__, self._ran, self._eager
        if not self._called:
            ran = eager = 0
        self._called = False
        self._in_run.update(ran=ran, eager=eager)
        if ran and eager:
            return Outcome(engine=f"{engine}, {eager} of {ran + eager} blocks eager")
        return Outcome(engine=engine if ran else "eager" if eager else "none")

    def idle(self) -> str | None:
        ran, eager, forwards = (self._in_run[name] for name in ("ran", "eager", "forwards"))
        if ran or not forwards:
            return None
        why = f"all {eager} blocks ran eagerly" if eager else "it was asked for no block"
        return (
            f"{self._workshop.engine.describe()} ran nothing in {forwards} forwards, since {why}; leave it out, or "
            f"{'make the blocks such as can be built' if eager else 'use a model that calls its block lists'}"
        )

    def block(self, call: BlockCall, next: Block) -> object:
        if self._aside:
            self._eager += 1
            return next(call)
        refuse_gradients()
        block = call.block
        admission = self._admitted.get(id(block))
        if admission is None or not admission.structure.unchanged:
            # The run's first call of the block, or a LoRA was switched, a processor set, weights moved between two.
            admission = self._admitted[id(block)] = self._workshop.admit(block, f"{call.name}.{call.index}")
        if admission.module is block:
            return self._run_piece(admission, call.args, call.kwargs)
        # The hooks that the user put on the block run as ever, around the engine.
        hooked = structural_twin(block, {})
        hooked.__dict__["forward"] = lambda *args, **kwargs: self._run_piece(admission, args, kwargs)
        return hooked(*call.args, **call.kwargs)

    def _run_piece(self, admission: Admission, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        args, kwargs = in_canonical_strides((args, kwargs))
        attention = self._kernel.label if self._kernel is not None else ""
        call = PieceCall(admission.module, args, kwargs, self._stage, attention)
        if self._surroundings is None:
            self._surroundings = self._workshop.surroundings(call.device)
        output, ran = self._workshop.run(call, admission, self._surroundings)
        self._ran += ran
        self._eager += not ran
        if ran and self._kernel is not None:
            # It is compiled in, so that its answers are not seen by it.
            self._kernel.answered = True
        return output


def _stage_of(run: Run) -> tuple[Hashable, ...] | None:
    """Name the token layout of the picture: its grid, and how that is split."""
    layout = run.layout or run.grid
    if layout is None:
        return None
    return layout.rows, layout.columns, layout.kind, layout.frame
