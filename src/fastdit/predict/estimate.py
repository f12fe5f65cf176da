"""What a plan costs by a model of costs: a sum over its stages and steps, a range where a cache decides as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdit.models.autoencoders import Coding
from fastdit.models.components import transformers_of
from fastdit.plan import Plan
from fastdit.predict.cost import CostModel, Probe, kept_model
from fastdit.predict.curve import Curve
from fastdit.stack import Stack
from fastdit.step import StagePlan, StepContext
from fastdit.step_cache.base import StepCache


@dataclass(frozen=True)
class Expected:
    """A number that is expected, and the range in which it lies as far as that is known beforehand."""

    value: float
    low: float
    high: float

    def __add__(self, other: Expected) -> Expected:
        return Expected(self.value + other.value, self.low + other.low, self.high + other.high)

    def __format__(self, spec: str) -> str:
        if self.high - self.low <= 0.01 * self.value:
            return f"{self.value:{spec}}"
        return f"{self.low:{spec}} to {self.high:{spec}}"


@dataclass(frozen=True)
class StageCost:
    """What a stage is expected to cost: its forwards, and the lift that leads to it."""

    index: int
    tokens: int
    steps: int
    seconds: Expected
    flops: Expected


@dataclass(frozen=True)
class Prediction:
    """What a call is expected to cost. `outside` are the seconds of text encoding, scheduler and decoding."""

    stages: tuple[StageCost, ...]
    outside: float
    bytes: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> Expected:
        return sum((stage.seconds for stage in self.stages), _known(self.outside))

    @property
    def flops(self) -> Expected:
        return sum((stage.flops for stage in self.stages), _known(0.0))

    def lines(self) -> tuple[str, ...]:
        """Say it in a line in all, and in one for each of several stages."""
        total = (
            f"predicted: {self.seconds:.3g} s, {_scaled(self.flops)}FLOPs in the transformer, "
            f"{self.bytes / 1e9:.3g} GB at its peak; {self.outside:.2g} s of it outside the transformer"
        )
        each = [
            f"predicted for stage {stage.index + 1}: {stage.seconds:.3g} s, {_scaled(stage.flops)}FLOPs"
            for stage in self.stages
        ]
        return (total, *(each if len(each) > 1 else ()), *self.notes)


def _scaled(flops: Expected) -> str:
    unit, name = next((unit for unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flops.value >= unit[0]), (1.0, ""))
    return f"{Expected(flops.value / unit, flops.low / unit, flops.high / unit):.3g} {name}"


@dataclass(frozen=True)
class Share:
    """What of a step's blocks is run, in FLOPs from 0 to 1, and of what is outside of them."""

    blocks: Expected
    outer: Expected

    def of(self, inner: float, rest: float) -> Expected:
        """Give what is spent of costs of the blocks, and of the rest."""
        blocks, outer = self.blocks, self.outer
        return Expected(
            inner * blocks.value + rest * outer.value,
            inner * blocks.low + rest * outer.low,
            inner * blocks.high + rest * outer.high,
        )


def _known(value: float) -> Expected:
    return Expected(value, value, value)


def probe_key(stack: Stack, steps: int) -> str:
    """Name what a stack was seen to do in runs of so many steps; engines and kernels change nothing of that."""
    deciding = (stack.schedule, stack.step_cache, stack.token_cache)
    return ", ".join(one.describe() for one in deciding if one is not None) + f" @ {steps}"


def predict(model: CostModel, pipeline: Any, plan: Plan, *, batch: int = 1) -> Prediction:
    """Predict a call by a plan. Raises `ValueError` where the plan does not know its tokens."""
    stack, rows = plan.stack, model.rows * batch
    notes = [] if model.warning is None else [model.warning]
    fine = max(_tokens(stage) for stage in plan.stages)
    probes = model.probes.get(probe_key(stack, plan.steps))
    probe = None if probes is None else Probe.at(probes, fine)
    shares = list(shares_of(plan, next(iter(transformers_of(pipeline).values())), probe))
    blocks = {name: one.seconds for name, one in model.blocks.items()}
    if stack.engine is not None:
        built = model.engines.get(stack.engine.describe())
        if built is None:
            notes.append(f"{stack.engine.describe()} was not measured yet, and counts as the model's own code")
        blocks |= built or {}
    if stack.attention is not None and not stack.attention.neutral:
        notes.append(f"{stack.attention.describe()} counts as the model's own attention")
    if probe is None and any(share.blocks.high > share.blocks.low for share in shares):
        notes.append("the range holds every decision that its caches may take; measure the stack to narrow it")
    stages, step = [], 0
    for stage in plan.stages:
        own = shares[step : step + stage.steps]
        step += stage.steps
        seconds = _forwards(model, blocks, own, rows, _tokens(stage), 1.0 if probe is None else probe.factor)
        if stage.index:
            switch = _switch(model, stack, plan.stages[stage.index - 1], stage, (fine, batch))
            seconds += _known(switch)
        flops = _flops(model, own, rows, _tokens(stage))
        stages.append(StageCost(stage.index, _tokens(stage), stage.steps, seconds, flops))
    outside = model.call + model.step * plan.steps + model.decode.at(batch, fine)
    most = max(model.forward_bytes.at(rows, fine), model.decode_bytes.at(batch, fine))
    return Prediction(tuple(stages), outside, int(model.weights + most), tuple(notes))


def remarks(pipeline: Any, plan: Plan) -> tuple[str, ...]:
    """Say what a plan is expected to cost, where the pipeline's costs were measured on this machine."""
    if not hasattr(pipeline, "_execution_device") or any(stage.tokens is None for stage in plan.stages):
        return ()
    model = kept_model(pipeline)
    return () if model is None else predict(model, pipeline, plan).lines()


def _tokens(stage: StagePlan) -> int:
    if stage.tokens is None:
        raise ValueError("costs go by tokens, and this pipeline's are not known")
    return stage.tokens


def _forwards(
    model: CostModel, blocks: dict[str, Curve], shares: list[Share], rows: int, tokens: int, factor: float
) -> Expected:
    inner = sum(one.count * blocks[name].at(rows, tokens) for name, one in model.blocks.items())
    times, rest = factor * model.forwards, model.rest.seconds.at(rows, tokens)
    return sum((share.of(times * inner, times * rest) for share in shares), _known(0.0))


def _flops(model: CostModel, shares: list[Share], rows: int, tokens: int) -> Expected:
    inner = sum(one.count * one.flops.at(rows, tokens) for one in model.blocks.values())
    rest = model.rest.flops.at(rows, tokens)
    return sum((share.of(model.forwards * inner, model.forwards * rest) for share in shares), _known(0.0))


def _switch(model: CostModel, stack: Stack, before: StagePlan, after: StagePlan, picture: tuple[int, int]) -> float:
    """Give the seconds that the autoencoder takes between two stages; what is beside it is small."""
    fine, batch = picture
    costs = {Coding.DECODE: model.decode, Coding.ENCODE: model.encode}
    asked = () if stack.schedule is None else stack.schedule.codings(before, after, fine)
    return sum(costs[coding].at(batch, tokens) for coding, tokens in asked)


def shares_of(plan: Plan, transformer: nn.Module, probe: Probe | None, depth: int | None = None) -> Iterator[Share]:
    """Say of each step what of it is run; `depth` counts the transformer's blocks where it has not got them all."""
    stack = plan.stack
    if probe is not None:
        for blocks, outer in zip(probe.shares, probe.outer, strict=True):
            yield Share(Expected(blocks, blocks * probe.low, min(blocks * probe.high, 1.0)), _known(outer))
        return
    cache, least = stack.step_cache, 1.0 if stack.token_cache is None else 0.0
    if cache is None:
        for step in range(plan.steps):
            low = 1.0 if step == 0 else least
            yield Share(Expected((1 + low) / 2, low, 1.0), _known(1.0))
        return
    # A gate that watches a signal is not asked, and need not know the model.
    known = cache if _watches(cache) else cache.for_transformer(transformer)
    skipped = 0.0 if cache.whole_forward else 1.0
    kept = known.leading_blocks + known.trailing_blocks
    left = min(kept / max(depth or _depth(transformer), 1), 1.0)
    often, seldom = (list(_computed(known, plan, skipping)) for skipping in (True, False))
    for most, fewest in zip(seldom, often, strict=True):
        low, high = (least if fewest else left), (1.0 if most else left)
        least_outer, most_outer = (1.0 if computed else skipped for computed in (fewest, most))
        beside = Expected((least_outer + most_outer) / 2, least_outer, most_outer)
        yield Share(Expected((low + high) / 2, low, high), beside)


def _watches(cache: StepCache) -> bool:
    return type(cache).signal is not StepCache.signal


def _depth(transformer: nn.Module) -> int:
    return sum(len(child) for child in transformer.children() if isinstance(child, nn.ModuleList))


def _computed(cache: StepCache, plan: Plan, skipping: bool) -> Iterator[bool]:
    """Say of each step whether it is computed; a gate that watches a signal always skips where it may, or never."""
    watches = _watches(cache)
    step, filled = 0, 0
    for stage in plan.stages:
        memory, consecutive, skipped = cache.memory(), 0, 0
        filled = filled if cache.stage_change == "carry" else 0
        for stage_step in range(stage.steps):
            context = StepContext(step, plan.steps, stage.index, stage_step, "main")
            forced = cache.neutral or filled == 0 or cache.policy.forced(context, consecutive, skipped) is not None
            if forced or (watches and filled < cache.warm_up):
                compute = True
            else:
                compute = not skipping if watches else cache.decide(memory, 0.0, context).compute
            if compute:
                memory.restart()
                filled, consecutive = filled + 1, 0
            else:
                consecutive, skipped = consecutive + 1, skipped + 1
            yield compute
            step += 1
