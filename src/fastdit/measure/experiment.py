"""The common loop of demo and benchmarks: configurations x prompts -> timed pictures -> metrics -> results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL.Image import Image

from fastdit.acceleration import accelerate
from fastdit.accelerator import Break
from fastdit.errors import UnsupportedModel
from fastdit.measure.environment import Environment
from fastdit.measure.images import psnr, sharpness, ssim
from fastdit.measure.results import ConfigurationResult, JsonObject, Metric, Results
from fastdit.measure.statistics import mean
from fastdit.measure.timing import Progress, Task, equal_time_steps, interleave, medians, silent, time_interleaved
from fastdit.stack import Stack

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdit.record import RunRecord

    #: Makes a round's pictures with a pipeline.
    Generate = Callable[[DiffusionPipeline], list[Image]]

#: Prompts whose pictures and run records are kept beside the numbers.
SHOWN = 6

#: Rounds that are measured however long they take.
FEWEST = 6


class Judge(Protocol):
    """Scores how far each image shows what its prompt asks for, from 0 to 1."""

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Configuration:
    """One way of making pictures: a stack (None: the untouched pipeline) and its call's keyword arguments."""

    name: str
    stack: Stack | None = None
    call: Mapping[str, object] = field(default_factory=dict)

    @property
    def method(self) -> JsonObject | None:
        """What makes it faster, as JSON; None where nothing does."""
        return None if self.stack is None else self.stack.to_json()

    @property
    def keeps_seed(self) -> bool:
        """Whether a seed still gives the plain pipeline's picture, so that the two can be compared by pixel."""
        return not any(Break.SEED_IMAGE in accelerator.effects.breaks for accelerator in self.stack or ())

    def open(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Give what makes the pictures, out of the experiment's pipeline."""
        return pipeline if self.stack is None else accelerate(pipeline, self.stack)

    def told(self, pipeline: DiffusionPipeline, generate: Generate) -> tuple[list[RunRecord], int | None]:
        """Make a first round with what was opened; give the record and the FLOPs that stand for every round.

        A stack tells them round by round. A plain pipeline is called through an empty stack, whose record tells them.
        """
        if self.stack is not None:
            generate(pipeline)
            return [], None
        recorder = accelerate(pipeline, Stack())
        generate(recorder)
        return [recorder.fastdit.last_run], counted(recorder.fastdit.last_run)


def counted(run: RunRecord) -> int:
    """Give a run's FLOPs. Raises `UnsupportedModel` where they can't be counted, for results hold them."""
    if run.flops is None:
        raise UnsupportedModel(f"{run.flops_unknown}; measure a model whose forward can be counted")
    return run.flops


def plain(steps: int, name: str | None = None) -> Configuration:
    """The untouched pipeline at this many steps."""
    return Configuration(name or f"{steps} steps", call={"num_inference_steps": steps})


@dataclass
class _Taken:
    """What was taken of one configuration so far; `flops` of a round where each round's record does not tell them."""

    configuration: Configuration
    records: list[RunRecord]
    flops: int | None
    images: list[Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()


@dataclass
class Experiment:
    """One pipeline, one list of prompts, one seed each: every configuration makes the same pictures, in turns.

    `call` holds the keyword arguments of all calls, and `encode` turns a round's prompts into those that depend on
    them (for pipelines that take embeddings). `batch` prompts make one round; the prompt's place in the list chooses
    its noise, so every configuration starts from the same.
    """

    pipeline: DiffusionPipeline
    prompts: Sequence[str]
    _: KW_ONLY
    seed: int = 0
    batch: int = 1
    call: Mapping[str, object] = field(default_factory=dict)
    encode: Callable[[Sequence[str]], Mapping[str, object]] = lambda prompts: {"prompt": list(prompts)}
    judge: Judge | None = None
    progress: Progress = silent
    _opened: dict[str, DiffusionPipeline] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) % self.batch:
            raise ValueError(f"the prompts must fill whole rounds of {self.batch}; got {len(self.prompts)}")

    @property
    def rounds(self) -> int:
        return len(self.prompts) // self.batch

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device
        return device

    def task(self, configuration: Configuration) -> Task[list[Image]]:
        """The call that makes one round's pictures."""
        return partial(self._generate, configuration, self._pipeline(configuration))

    def rival(self, accelerated: Configuration, *, rounds: int = 3) -> int:
        """The count of plain steps that takes as long as `accelerated`; see `equal_time_steps`."""
        return equal_time_steps(
            lambda count: self.task(plain(count)),
            self.task(accelerated),
            rounds=rounds,
            device=self.device,
            progress=partial(self.progress, "finding the equal-time rival"),
        )

    def race(self, configurations: Sequence[Configuration], *, rounds: int = 2) -> dict[str, float]:
        """The median seconds of each configuration, by its name, in short turns after a warm-up."""
        tasks = {configuration.name: self.task(configuration) for configuration in configurations}
        say = partial(self.progress, "finding the fastest stack")
        return medians(time_interleaved(tasks, rounds=rounds, device=self.device, progress=say))

    def run(
        self,
        configurations: Sequence[Configuration],
        *,
        title: str,
        baseline: str,
        directory: Path | None = None,
        keep: Callable[[Results], None] | None = None,
        until: float | None = None,
    ) -> tuple[Results, dict[str, list[Image]]]:
        """Run every configuration on every prompt, interleaved; give the results and all pictures.

        With a `directory`, the pictures of the first prompts are saved there. `keep` is given the results so far after
        every round. No round begins that would end after `until`, in seconds of the monotonic clock, once there are
        `FEWEST` of them. An interrupt (Ctrl-C) after the first whole round ends the measurement there; one before it is
        raised. In both cases the results say so.
        """
        taken: dict[str, _Taken] = {}
        for done, configuration in enumerate(configurations, start=1):
            generate = partial(self._generate, configuration, number=0)
            told = configuration.told(self._pipeline(configuration), generate)
            taken[configuration.name] = _Taken(configuration, *told)
            self.progress("warm-up", done, len(configurations))
        tasks = {name: self.task(one.configuration) for name, one in taken.items()}
        samples = interleave(tasks, rounds=self.rounds, warmup=0, seed=self.seed, device=self.device)
        rounds, planned, cut, began = 0, self.rounds, "shortened", time.monotonic()
        try:
            for done, sample in enumerate(samples, start=1):
                one = taken[sample.task]
                one.images += sample.output
                one.seconds.append(sample.seconds)
                if one.configuration.stack is not None:
                    one.records.append(self._opened[sample.task].fastdit.last_run)
                if done % len(tasks) == 0:
                    self._score(taken, baseline, rounds, directory)
                    rounds += 1
                    if until is not None:
                        each, left = (time.monotonic() - began) / rounds, until - time.monotonic()
                        planned = min(max(rounds + max(int(left / each), 0), FEWEST), self.rounds)
                    if keep is not None and rounds < planned:
                        keep(self._results(taken, title, baseline, rounds, "interrupted"))
                self.progress("measuring", done, planned * len(tasks))
                if rounds == planned:
                    break
        except KeyboardInterrupt:
            if not rounds:
                raise
            cut = "interrupted"
        results = self._results(taken, title, baseline, rounds, cut)
        if keep is not None:
            keep(results)
        return results, {name: one.images[: rounds * self.batch] for name, one in taken.items()}

    def _pipeline(self, configuration: Configuration) -> DiffusionPipeline:
        if configuration.name not in self._opened:
            self._opened[configuration.name] = configuration.open(self.pipeline)
        return self._opened[configuration.name]

    def _generate(self, configuration: Configuration, pipeline: DiffusionPipeline, number: int) -> list[Image]:
        first = number * self.batch
        places = range(first, first + self.batch)
        generators = [torch.Generator("cpu").manual_seed(self.seed + place) for place in places]
        call = {**self.encode(self.prompts[first : first + self.batch]), **self.call, **configuration.call}
        images: list[Image] = pipeline(generator=generators, **call).images
        return images

    def _score(self, taken: Mapping[str, _Taken], baseline: str, number: int, directory: Path | None) -> None:
        """Score the pictures of a round, and save them if they are among the first."""
        first = number * self.batch
        places = slice(first, first + self.batch)
        references = taken[baseline].images[places]
        for name, one in taken.items():
            images = one.images[places]
            found = {} if self.judge is None else {"judge": self.judge.score(images, self.prompts[places]).tolist()}
            found["sharpness"] = sharpness(images)
            if one.configuration.keeps_seed:
                found |= {"psnr": psnr(images, references), "ssim": ssim(images, references)}
            for metric, values in found.items():
                one.scores.setdefault(metric, []).extend(values)
            if directory is not None:
                one.saved += save_images(images[: max(SHOWN - first, 0)], directory, name, first)

    def _results(self, taken: Mapping[str, _Taken], title: str, baseline: str, rounds: int, cut: str) -> Results:
        """The results of the first rounds, and by what they were `cut`, if they are not all."""
        cut_short = {} if rounds == self.rounds else {cut: f"after {rounds} of {self.rounds} rounds"}
        return Results(
            title=title,
            baseline=baseline,
            environment=Environment.capture(str(self.device)),
            settings={
                "pipeline": type(self.pipeline).__name__,
                "seed": self.seed,
                "call": _as_json(self.call),
                "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
                **cut_short,
            },
            prompts=tuple(self.prompts[: rounds * self.batch]),
            images_per_round=self.batch,
            configurations=tuple(self._result(one, rounds) for one in taken.values()),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _result(self, taken: _Taken, rounds: int) -> ConfigurationResult:
        runs, scored = taken.records[:rounds], rounds * self.batch
        return ConfigurationResult(
            name=taken.configuration.name,
            stack=taken.configuration.method,
            call=_as_json(taken.configuration.call),
            seconds=tuple(taken.seconds[:rounds]),
            flops=tuple(map(counted, runs)) if taken.flops is None else (taken.flops,) * rounds,
            metrics={
                name: Metric(mean(values[:scored]), tuple(values[:scored])) for name, values in taken.scores.items()
            },
            records=tuple(run.to_json() for run in runs[:SHOWN]),
            images=taken.saved[:scored],
        )


def save_images(images: Sequence[Image], directory: Path, name: str, first: int = 0) -> tuple[str, ...]:
    """Save pictures, numbered from `first`, as PNG under `directory`/images; give their names relative to it."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{stem}-{index}.png" for index in range(first, first + len(images))]
    for image, file_name in zip(images, names, strict=True):
        image.save(directory / file_name, optimize=True)
    return tuple(names)


def _as_json(call: Mapping[str, object]) -> JsonObject:
    """A call's arguments as JSON can hold them."""
    return {name: v if isinstance(v, str | int | float | bool | None) else str(v) for name, v in call.items()}
