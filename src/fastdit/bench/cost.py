"""Measuring the costs of a pipeline on this machine, in short runs of a few sizes, for `fastdit.predict`.

A run of few steps at each size, one of two images, a decoding and an encoding; all in rounds, so that whatever slows
the machine down for a while slows all of it. Costs are lower quartiles over the rounds, which others' work reaches less
than a median. How far timings of the same work were apart is kept beside them, so that costs of a busy machine are
known as such.
"""

from __future__ import annotations

import operator
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import flops
from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator, Level
from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.engine.base import Engine
from fastdit.errors import FastditWarning, UnsupportedModel
from fastdit.measure.environment import Environment
from fastdit.measure.timing import timed
from fastdit.models.components import arguments_of, grid_of
from fastdit.models.family import family_of
from fastdit.nested import tensors_of
from fastdit.predict.cost import BlockCost, CostModel, Probe, Steadiness
from fastdit.predict.curve import Curve
from fastdit.predict.estimate import probe_key
from fastdit.record import RunRecord, StepRecord, Stopwatch
from fastdit.run import Run
from fastdit.stack import Stack

#: Sides of the pictures that are measured, as parts of the pipeline's own, and steps of a run.
PARTS = (0.25, 0.5, 0.75, 1.0)
STEPS = (2, 5)

#: Rounds at most, and the seconds after which no further one begins.
ROUNDS, SECONDS = 5, 30.0

#: Arguments of a call that are chosen here.
_OWN = ("height", "width", "num_inference_steps", "generator", "output_type")

Place = tuple[int, int]
"""Images and tokens of each."""

Clock = Callable[[], float]
"""Gives seconds since whenever."""

Part = tuple[float, float]
"""The shares of its FLOPs that a forward spent: of its blocks', and of what is outside of them."""


@dataclass(frozen=True)
class BlockClock(Accelerator):
    """Notes the seconds of every block; changes nothing."""

    level: ClassVar[Level] = Level.ATTENTION

    def check_values(self) -> None:
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "ticks", time.perf_counter)

    @classmethod
    def by(cls, ticks: Clock) -> BlockClock:
        """Give one that reads this clock on a CPU."""
        made = cls()
        object.__setattr__(made, "ticks", ticks)
        return made

    @property
    def neutral(self) -> bool:
        return True

    def enter(self, run: Run, lasting: None) -> Pass:
        return _ClockPass(vars(self)["seen"], vars(self)["ticks"])


class _ClockPass(Pass):
    def __init__(self, seen: list[tuple[str, Stopwatch]], ticks: Clock) -> None:
        self._seen, self._device, self._ticks = seen, torch.device("cpu"), ticks

    def forward(self, call: ForwardCall, next: Forward) -> object:
        self._device = call.device
        return next(call)

    def block(self, call: BlockCall, next: Block) -> object:
        watch = Stopwatch(self._device, self._ticks)
        output = next(call)
        watch.stop()
        self._seen.append((call.name, watch))
        return output


@dataclass(frozen=True)
class BlockCounter(BlockClock):
    """Counts the FLOPs of every block in the place of its seconds."""

    def enter(self, run: Run, lasting: None) -> Pass:
        return _CounterPass(vars(self)["seen"])


class _CounterPass(Pass):
    def __init__(self, seen: list[tuple[str, int]]) -> None:
        self._seen = seen

    def block(self, call: BlockCall, next: Block) -> object:
        self._seen.append((call.name, flops.count(call.block, *call.args, **call.kwargs).total))
        return next(call)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made and alive; what kernels take for themselves is left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_of(output):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if tensor.device.type != "meta" and size and key not in self._known:
                self._known.add(key)
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._gone, key, size)
        return output

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Give the most memory that a call had allocated beside what was there: a GPU's allocator's, or live tensors'."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        call()
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    with LiveBytes() as live:
        call()
    return int(live.most)


def undisturbed(seconds: Sequence[float]) -> float:
    """Give the lower quartile of timings of the same work: what it takes while nothing else runs, or little.

    >>> undisturbed([1.0, 1.1, 1.2, 5.0])
    1.075
    """
    return seconds[0] if len(seconds) == 1 else quantiles(seconds, n=4, method="inclusive")[0]


class CostMeter:
    """Takes a pipeline's costs. `call` holds what its calls need besides size and steps: prompts, or embeddings.

    Raises `UnsupportedModel` for a pipeline whose tokens are not known.
    """

    def __init__(
        self, pipeline: Any, call: Mapping[str, Any], parts: Sequence[float] = PARTS, clock: Clock = time.perf_counter
    ) -> None:
        family = family_of(pipeline)
        if family is None:
            raise UnsupportedModel(
                f"costs go by image tokens, and {type(pipeline).__name__}'s are not known; describe its family in "
                "fastdit.models, or measure your stacks with fastdit bench"
            )
        self.pipeline, self.family = pipeline, family
        self.call = {name: value for name, value in call.items() if name not in _OWN}
        size = family.size(pipeline, arguments_of(pipeline, height=call.get("height"), width=call.get("width")))
        rows, columns = family.grid(pipeline, *size)
        pixels = size[0] // rows, size[1] // columns
        self.sizes = [
            tuple(max(round(count * part), 2) * side for count, side in zip((rows, columns), pixels, strict=True))
            for part in parts
        ]
        self._ticks, self._clock = clock, BlockClock.by(clock)
        self._twin = accelerate(pipeline, [self._clock])
        self._blocks: defaultdict[tuple[str, Place], list[float]] = defaultdict(list)
        self._rest: defaultdict[Place, list[float]] = defaultdict(list)
        self._outside: defaultdict[int, list[float]] = defaultdict(list)
        self._pictures: dict[str, defaultdict[Place, list[float]]] = {
            name: defaultdict(list) for name in ("decode", "encode")
        }
        self._engines: dict[str, tuple[BlockClock, Any, defaultdict[tuple[str, Place], list[float]]]] = {}
        self._counts: dict[str, int] = {}
        self._rows = self._forwards = 1

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device
        return device

    def tokens(self, size: Sequence[int]) -> int:
        """Give the image tokens of a size in pixels."""
        rows, columns = grid_of(self.family, self.pipeline, {"height": size[0], "width": size[1]})
        return rows * columns

    def add_engine(self, engine: Engine) -> None:
        """Measure an engine, too, at the sizes of the upper half; it is built for them now."""
        clock = BlockClock.by(self._ticks)
        twin = accelerate(self.pipeline, [clock, engine])
        for size in self.sizes[-2:]:
            self._run(twin, size, 2)
        self._engines[engine.describe()] = clock, twin, defaultdict(list)

    def rounds(self, most: int = ROUNDS, seconds: float = SECONDS) -> CostModel:
        """Take rounds until the time is up, and give the costs."""
        start = time.monotonic()
        for number in range(most):
            if number == 0 or time.monotonic() - start < seconds * number / (number + 1):
                self.round()
        return self.fitted()

    def round(self) -> None:
        """Take every cost once more."""
        first = not self._rest
        for size in self.sizes:
            if first:
                self._timed(size, STEPS[0], 1, keep=False)
            for steps in STEPS:
                self._timed(size, steps, 1)
        self._timed(self.sizes[len(self.sizes) // 2], STEPS[0], 2)
        for clock, twin, found in self._engines.values():
            for size in self.sizes[-2:]:
                self._clocked(clock, twin, size, STEPS[0], 1, found)

    def _run(self, twin: Any, size: Sequence[int], steps: int, images: int = 1) -> Any:
        generator = torch.Generator().manual_seed(0)
        more = {} if images == 1 else {"num_images_per_prompt": images}
        call = {**self.call, **more, "height": size[0], "width": size[1], "num_inference_steps": steps}
        return twin(**call, generator=generator, output_type="latent")

    def _clocked(
        self, clock: BlockClock, twin: Any, size: Sequence[int], steps: int, images: int, found: Any
    ) -> tuple[float, RunRecord, float, Any]:
        """Run, note a block's mean seconds in `found`, and give the run's seconds, its record, a forward's mean rest.

        Means over a run, since a call takes as long as the sum of its forwards, the slow ones among them.
        """
        seen: list[tuple[str, Stopwatch]] = vars(clock)["seen"]
        seen.clear()
        seconds, output = timed(lambda _: self._run(twin, size, steps, images), 0, self.device)
        record: RunRecord = twin.fastdit.last_run
        each = len(seen) // len(record.steps)
        place, forwards = (images, self.tokens(size)), len(record.steps)
        self._counts = {name: sum(one == name for one, _ in seen[:each]) for name, _ in seen[:each]}
        sums: defaultdict[str, float] = defaultdict(float)
        for name, watch in seen:
            sums[name] += watch.seconds
        for name, own in sums.items():
            found[name, place].append(own / self._counts[name] / forwards)
        rest = (sum(one.seconds for one in record.steps) - sum(sums.values())) / forwards
        return seconds, record, rest, output

    def _timed(self, size: Sequence[int], steps: int, images: int, *, keep: bool = True) -> None:
        found = self._blocks if keep else defaultdict(list)
        seconds, record, rest, output = self._clocked(self._clock, self._twin, size, steps, images, found)
        self._rows, self._forwards = record.steps[0].batch // images, sum(one.step == 0 for one in record.steps)
        if not keep:
            return
        place = images, self.tokens(size)
        self._rest[place].append(rest)
        if images == 1:
            self._outside[steps].append(seconds - sum(one.seconds for one in record.steps))
        if steps == STEPS[0]:
            self._picture(place, size, output[0])

    def _picture(self, place: Place, size: Sequence[int], latents: torch.Tensor) -> None:
        """Time the autoencoder, both ways, and what turns its pixels into pictures."""
        frames = self._frames(size, latents)
        with torch.no_grad():
            seconds, pixels = timed(lambda _: self.family.decode(self.pipeline, frames), 0, self.device)
            processor = getattr(self.pipeline, "image_processor", None)
            if processor is not None:
                seconds += timed(lambda _: processor.postprocess(pixels, output_type="pil"), 0, self.device)[0]
            self._pictures["decode"][place].append(seconds)
            taken, _ = timed(lambda _: self.family.encode(self.pipeline, pixels.clamp(-1.0, 1.0)), 0, self.device)
            self._pictures["encode"][place].append(taken)

    def _frames(self, size: Sequence[int], latents: torch.Tensor) -> torch.Tensor:
        grid = grid_of(self.family, self.pipeline, {"height": size[0], "width": size[1]})
        return self.family.unpack(self.family.tokens(latents), *grid)

    def fitted(self) -> CostModel:
        """Fit the costs to what was taken so far."""
        rows = self._rows
        counted = {size: self._counted(size) for size in self.sizes[-3:]}
        blocks = {}
        for name, count in self._counts.items():
            points = _points({place: own for (one, place), own in self._blocks.items() if one == name}, rows)
            costs = [(rows, self.tokens(size), float(found[name])) for size, found in counted.items()]
            blocks[name] = BlockCost(count, Curve.fit(points), _flops_curve(costs))
        outer = [(rows, self.tokens(size), float(found[""])) for size, found in counted.items()]
        rest = BlockCost(1, Curve.fit(_points(self._rest, rows)), _flops_curve(outer))
        short, long = (undisturbed(self._outside[steps]) for steps in STEPS)
        step = max((long - short) / (STEPS[1] - STEPS[0]), 0.0)
        memory = [(self.tokens(size), *self._memory(size)) for size in self.sizes[1:]]
        model = CostModel(
            pipeline=type(self.pipeline).__name__,
            machine=str(Environment.capture(str(self.device))),
            rows=rows,
            forwards=self._forwards,
            sizes=tuple(self.tokens(size) for size in self.sizes),
            blocks=blocks,
            rest=rest,
            call=max(short - STEPS[0] * step, 0.0),
            step=step,
            decode=Curve.fit(_points(self._pictures["decode"], 1)),
            encode=Curve.fit(_points(self._pictures["encode"], 1)),
            weights=_weights(self.pipeline),
            forward_bytes=Curve.fit([(rows, tokens, float(most)) for tokens, most, _ in memory]),
            decode_bytes=Curve.fit([(1, tokens, float(most)) for tokens, _, most in memory]),
            error=0.0,
            engines={
                engine: {
                    name: Curve.fit(_points({at: own for (one, at), own in found.items() if one == name}, rows))
                    for name in blocks
                }
                for engine, (_, _, found) in self._engines.items()
            },
        )
        return replace(model, error=self._error(model), steadiness=self.steadiness())

    def steadiness(self) -> Steadiness | None:
        """Tell how far timings of the same work are apart: of the blocks of a forward at each size, and of engines'."""
        counts = self._counts
        work = {"": self._blocks} | {f" by {engine}": found for engine, (_, _, found) in self._engines.items()}
        timings = {}
        for by, found in work.items():
            for place in dict.fromkeys(place for _, place in found):
                own = zip(*(found[name, place] for name in counts), strict=True)
                blocks = [sum(map(operator.mul, counts.values(), forward)) for forward in own]
                timings[f"{place[0]} x {place[1]} tokens through the blocks{by}"] = blocks
        return Steadiness.of(timings)

    def _error(self, model: CostModel) -> float:
        errors = []
        for place in self._rest:
            seen = undisturbed(self._rest[place])
            said = model.rest.seconds.at(place[0] * model.rows, place[1])
            for name, one in model.blocks.items():
                seen += one.count * undisturbed(self._blocks[name, place])
                said += one.count * one.seconds.at(place[0] * model.rows, place[1])
            errors.append(abs(said / seen - 1.0))
        return sum(errors) / len(errors)

    def _counted(self, size: Sequence[int]) -> dict[str, int]:
        """Count a forward's FLOPs at a size: of a block of each list on average, and "" for all the rest."""
        counter = BlockCounter()
        twin = accelerate(self.pipeline, [counter])
        self._run(twin, size, 1)
        forwards = twin.fastdit.last_run.steps
        sums: defaultdict[str, list[int]] = defaultdict(list)
        for name, count in vars(counter)["seen"]:
            sums[name].append(count)
        total = forwards[0].full_flops or 0
        found = {name: sum(own) // len(own) for name, own in sums.items()}
        return {**found, "": total - sum(map(sum, sums.values())) // len(forwards)}

    def _memory(self, size: Sequence[int]) -> tuple[int, int]:
        """Give the most bytes that a forward, and a decoding, have alive beside the weights."""
        found: list[torch.Tensor] = []
        forward = peak_bytes(lambda: found.append(self._run(self.pipeline, size, 1)[0]), self.device)
        frames = self._frames(size, found[0])

        def decode() -> None:
            with torch.no_grad():
                self.family.decode(self.pipeline, frames)

        return forward, peak_bytes(decode, self.device)


def _points(found: Mapping[Place, Sequence[float]], rows: int) -> list[tuple[int, int, float]]:
    return [(images * rows, tokens, max(undisturbed(own), 0.0)) for (images, tokens), own in found.items()]


def _flops_curve(points: Sequence[tuple[int, int, float]]) -> Curve:
    """Lay the parabola through three points, since FLOPs are no measurements; all of them are the rows'."""
    import numpy as np

    tokens, values = np.array([point[1] for point in points], float), np.array([point[2] for point in points])
    powers = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
    found = np.linalg.lstsq(powers, values / points[0][0], rcond=None)[0]
    return Curve(0.0, *map(float, found))


def _weights(pipeline: Any) -> int:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    kept = {id(one): one.nbytes for module in modules for one in (*module.parameters(), *module.buffers())}
    return sum(kept.values())


def probed(
    meter: CostMeter, model: CostModel, stack: Stack, steps: int | None = None, seeds: Sequence[int] = (0, 1)
) -> CostModel:
    """Run a stack, without its engine, at half the size and at the whole; give the model with what it did there."""
    twin = accelerate(meter.pipeline, [one for one in stack if one.level is not Level.ENGINE])
    sizes = meter.sizes[len(meter.sizes) // 2 - 1], meter.sizes[-1]
    found = tuple(_probe(meter, model, twin, size, steps, seeds) for size in dict.fromkeys(map(tuple, sizes)))
    return replace(model, probes={**model.probes, probe_key(stack, len(found[0].shares)): found})


def _probe(
    meter: CostMeter, model: CostModel, twin: Any, size: Sequence[int], steps: int | None, seeds: Sequence[int]
) -> Probe:
    tokens = [stage.tokens or 0 for stage in twin.fastdit.plan(*size, steps).stages]
    runs = [_probe_run(meter, twin, size, steps, seed) for seed in seeds]
    spent = [[_spent(model, one, tokens[one.stage]) for one in run.steps] for run in runs]
    of_step: defaultdict[int, list[Part]] = defaultdict(list)
    for run, own in zip(runs, spent, strict=True):
        for record, part in zip(run.steps, own, strict=True):
            of_step[record.step].append(part)
    shares, outer = ([sum(part[at] for part in own) / len(own) for own in of_step.values()] for at in (0, 1))
    totals = [sum(part[0] for part in own) for own in spent]
    middle = sum(totals) / len(totals)
    factor = 1.0
    if twin.fastdit.stack.token_cache is not None:
        plain = [_probe_run(meter, accelerate(meter.pipeline, Stack()), size, 4, seed) for seed in seeds]
        whole = [[(1.0, 1.0)] * len(run.steps) for run in plain]
        factor = _over(model, runs, spent, tokens) / _over(model, plain, whole, [meter.tokens(size)])
    return Probe(max(tokens), tuple(shares), tuple(outer), min(totals) / middle, max(totals) / middle, factor)


def _over(model: CostModel, runs: Sequence[RunRecord], spent: Sequence[Sequence[Part]], tokens: Sequence[int]) -> float:
    taken = said = 0.0
    for run, own in zip(runs, spent, strict=True):
        for record, (inner, rest) in zip(run.steps, own, strict=True):
            where = record.batch, tokens[record.stage]
            taken += record.seconds
            said += rest * model.rest.seconds.at(*where)
            said += inner * sum(one.count * one.seconds.at(*where) for one in model.blocks.values())
    return taken / said


def _probe_run(meter: CostMeter, twin: Any, size: Sequence[int], steps: int | None, seed: int) -> RunRecord:
    call = {**meter.call, "height": size[0], "width": size[1], "output_type": "latent"}
    if steps is not None:
        call["num_inference_steps"] = steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastditWarning)  # what skips nothing is a finding, too
        twin(**call, generator=torch.Generator().manual_seed(seed))
    record: RunRecord = twin.fastdit.last_run
    return record


def _spent(model: CostModel, record: StepRecord, tokens: int) -> Part:
    """Give what a forward spent of its blocks' FLOPs, and of those outside of them, as shares."""
    whole, did = record.full_flops, record.flops
    if whole is None or did is None:
        raise UnsupportedModel(f"costs go by FLOPs: {record.flops_unknown}")
    outer = model.rest.flops.at(record.batch, tokens)
    return (0.0, 0.0) if did == 0 else (max(did - outer, 0.0) / (whole - outer), 1.0)
