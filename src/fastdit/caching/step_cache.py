"""The step-cache level: one decision a forward, taken at the first block chain that sees the latents.

    computed   run every block; keep r = (end of chain) - (start of chain), a tensor for each carried stream
    skipped    end of chain = (start of chain) + forecast(r)

What lies between the chains stays the model's own forward. State is per run, denoiser, branch and stage.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from fastdit.accelerator import Accelerator, Break, Change, Level, Need, is_count, register
from fastdit.errors import FastditWarning, IncompatibleStack, InvalidConfig
from fastdit.run import Run, StepContext
from fastdit.wiring import BlockCall, BlockPort, Chain, Wiring, outputs_of, read_port, returned, version_of

from .forecast import Features, Forecaster, History, Reuse, is_forecast


@register
@dataclasses.dataclass(frozen=True)
class SkipPolicy:
    """Which steps are computed whatever the gate says.

    The first `first` and last `last` steps of a run, and any step after `max_consecutive` skipped ones in a row. The
    first step of a stage is always computed: there is no history to skip on.
    """

    first: int = 1
    last: int = 1
    max_consecutive: int | None = None

    def __post_init__(self) -> None:
        if not is_count(self.first) or not is_count(self.last):
            raise InvalidConfig(f"SkipPolicy counts steps: first and last are whole numbers from 0, got {self}")
        if self.max_consecutive is not None and not is_count(self.max_consecutive, 1):
            raise InvalidConfig(f"max_consecutive must be at least 1 or None, got {self.max_consecutive!r}")

    def forced(self, context: StepContext, consecutive: int) -> str | None:
        """Say why a step must be computed, or None."""
        if context.step < self.first:
            return "first steps"
        if context.step >= context.total_steps - self.last:
            return "last steps"
        if self.max_consecutive is not None and consecutive >= self.max_consecutive:
            return "most skips in a row"
        return None


@dataclasses.dataclass
class GateState:
    """What a gate remembers between the steps of one branch and stage; gates use the fields they need."""

    signal: torch.Tensor | None = None
    change: torch.Tensor | None = None
    end: torch.Tensor | None = None
    accumulated: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A gate's answer, with its reason for the record. `doubt` marks a signal that can't be trusted."""

    compute: bool
    reason: str
    doubt: bool = False


@dataclasses.dataclass(frozen=True)
class StepCache(Accelerator):
    """Base of the step caches: a gate (the subclass), a forecaster and a skip policy."""

    _: dataclasses.KW_ONLY
    forecast: Forecaster = dataclasses.field(default_factory=Reuse)
    policy: SkipPolicy = dataclasses.field(default_factory=SkipPolicy)

    level: ClassVar = Level.STEP_CACHE
    changes: ClassVar = frozenset({Change.STEP_ORDER})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.BATCH_INVARIANCE})

    def __post_init__(self) -> None:
        if not isinstance(self.forecast, Forecaster):
            raise InvalidConfig(f"forecast is a forecaster such as Reuse() or Taylor(1), got {self.forecast!r}")
        if not isinstance(self.policy, SkipPolicy):
            raise InvalidConfig(f"policy is a SkipPolicy, got {self.policy!r}")

    #: How many blocks run before the gate sees its signal.
    leading_blocks: ClassVar[int] = 0

    def signal(self, chain_input: torch.Tensor, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the tensor that the gate watches, from the entry block and its arguments; None where it needs none."""
        return None

    def judge(self, state: GateState, signal: Any, context: StepContext, forced: str | None) -> Verdict:
        """Decide a step and update `state`. With `forced` given the answer must be to compute, for that reason."""
        raise NotImplementedError

    def for_transformer(self, transformer: Any) -> StepCache:
        """Give the configuration with everything filled in that depends on the model."""
        return self

    def learn(self, state: GateState, end: torch.Tensor, context: StepContext) -> None:
        """Take in the latents' stream as it left the last chain of a computed step."""

    def check_run(self, total_steps: int) -> None:
        """Raise `InvalidConfig` if the gate can't serve a run of this many steps."""


def relative_change(signal: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Mean |signal - before| over mean |before|, float32, left on its device."""
    return (signal - before).abs().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)


def finite(change: torch.Tensor) -> float | None:
    """Read a change (the one host-device synchronisation of a step); None if it is not a finite number."""
    value = float(change)
    return value if math.isfinite(value) else None


@dataclasses.dataclass
class BranchState:
    """All that a step cache keeps for one denoiser, branch and stage."""

    gate: GateState = dataclasses.field(default_factory=GateState)
    history: History = dataclasses.field(default_factory=History)
    consecutive: int = 0


class CachePass:
    """One forward under a step cache: answers every block call of the structural twin."""

    def __init__(self, cache: StepCache, wiring: Wiring, run: Run) -> None:
        self._cache, self._wiring, self._run = cache, wiring, run
        self._where = wiring.where()

    def begin(self, context: StepContext, state: BranchState, observed: Sequence[BlockCall] = ()) -> None:
        """Start a forward; `observed` holds its block calls where it has already run to be observed."""
        self._context, self._state = context, state
        self._observed = bool(observed)
        self._verdict: Verdict | None = None
        self._features: Features = []
        self._start: list[Any] = []
        self._versions: list[int] = []
        self._prediction: Features = []
        self._lead: torch.Tensor | None = None
        self._end: torch.Tensor | None = None
        self.skipped: list[str] = []
        self.action = "computed"
        self.reason = "no block was called"
        self.tokens: int | None = None
        for call in observed:
            call.again(self)

    def _release(self) -> None:
        self._features, self._start, self._prediction, self._lead, self._end = [], [], [], None, None

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block call: run it, pass its streams through, or give the end of its chain."""
        found = self._where.get((name, index))
        if found is None or found[0] < self._wiring.entry:
            return block(*args, **kwargs)
        number, place = found
        chain = self._wiring.chains[number]
        lead = min(self._cache.leading_blocks, len(chain.blocks)) if number == self._wiring.entry else 0
        port = chain.blocks[place]
        values = [read_port(source, args, kwargs) for source in port.inputs]
        if number == self._wiring.entry and place == 0:
            stream = chain.latent_stream or 0
            self.tokens = values[stream].shape[1] if values[stream].dim() > 2 else None
            self._lead = values[stream]
            if lead == 0:
                self._decide(self._cache.signal(values[stream], block, args, kwargs))
        if place < lead:
            output = block(*args, **kwargs)
            if place == lead - 1 and self._lead is not None:
                stream = port.outputs[chain.latent_stream or 0] or 0
                self._decide(outputs_of(port, output)[stream] - self._lead)
            return output
        if place == lead:
            self._start = values
            self._versions = [version_of(value) for value in values]
        return self._inside(chain, port, values, block, args, kwargs)

    def end(self) -> None:
        """Take in what a computed forward gave."""
        if self._verdict is None or not self._verdict.compute:
            self._release()
            return
        history = self._state.history
        if not history.fits([feature.shape for feature in self._features]):
            history.steps, history.differences = [], []
        self._cache.forecast.record(history, self._context.step, self._features)
        if self._end is not None:
            self._cache.learn(self._state.gate, self._end, self._context)
        self._release()

    def _inside(
        self,
        chain: Chain,
        port: BlockPort,
        values: list[Any],
        block: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        last = port is chain.blocks[-1]
        if self._verdict is None or self._verdict.compute:
            output = block(*args, **kwargs)
            if last:
                self._keep(chain, port, outputs_of(port, output))
            return output
        self.skipped.append(f"{port.name}.{port.index}")
        if last:
            values = [
                start + self._prediction.pop(0) if out is not None else None
                for start, out in zip(self._start, port.outputs, strict=True)
            ]
        return returned(port, {out: v for out, v in zip(port.outputs, values, strict=True) if out is not None})

    def _keep(self, chain: Chain, port: BlockPort, outputs: dict[int, torch.Tensor]) -> None:
        """Keep the residual of a chain. Raises if a block wrote into the tensors that entered it."""
        for start, version, out in zip(self._start, self._versions, port.outputs, strict=True):
            if version_of(start) != version:
                raise IncompatibleStack(
                    f"a block before {port.name}.{port.index} writes into its input in place, so the residual of the "
                    "blocks can't be known; use kernels that don't, or a stack without a step cache"
                )
            if out is not None:
                self._features.append(outputs[out] - start)
        watched = port.outputs[chain.latent_stream] if chain.latent_stream is not None else None
        self._end = outputs[watched] if watched is not None else max(outputs.values(), key=torch.Tensor.numel)

    def _decide(self, signal: Any) -> None:
        state, context = self._state, self._context
        forced = self._cache.policy.forced(context, state.consecutive)
        if self._observed:
            forced = forced or "observed for the first time"
        if not state.history.differences:
            forced = forced or ("first step of a stage" if context.stage_step == 0 else "no history")
        elif state.gate.signal is not None and signal is not None and state.gate.signal.shape != signal.shape:
            forced, state.gate, state.history = "another shape", GateState(), History()
        verdict = self._cache.judge(state.gate, signal, context, forced)
        if verdict.doubt:
            self._run.doubts += 1
            if self._run.doubts == 1:
                warnings.warn(
                    f"{type(self._cache).__name__}: the signal of step {context.step} ({context.branch}) is not a "
                    "finite number; the step is computed. Look for NaN or inf in the latents or in the weights",
                    FastditWarning,
                    stacklevel=2,
                )
        self._verdict, self.reason = verdict, verdict.reason
        if verdict.compute:
            state.consecutive = 0
            return
        state.consecutive += 1
        self.action = "forecast" if is_forecast(self._cache.forecast, state.history) else "reused"
        self._prediction = self._cache.forecast.predict(state.history, context.step)
