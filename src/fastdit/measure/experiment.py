"""The common loop of demo and benchmarks: configurations x prompts -> timed pictures -> metrics -> results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fastdit.acceleration import accelerate
from fastdit.accelerator import Break
from fastdit.measure.environment import Environment
from fastdit.measure.images import psnr, sharpness, ssim
from fastdit.measure.results import ConfigurationResult, Metric, Results
from fastdit.measure.rival import equal_time_steps
from fastdit.measure.statistics import mean
from fastdit.measure.timing import Task, interleave
from fastdit.stack import Stack

#: Hears what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

#: Prompts whose pictures and run records are kept beside the numbers.
SHOWN = 6


class Judge(Protocol):
    """Scores how far each image shows what its prompt asks for, from 0 to 1."""

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Configuration:
    """One way of making pictures: a stack (None: the untouched pipeline) and its call's keyword arguments.

    Instead of a stack it can bring a `pipeline` of its own, such as one that another library made faster.
    """

    name: str
    stack: Stack | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Any = None

    def __post_init__(self) -> None:
        if self.stack is not None and self.pipeline is not None:
            raise ValueError(
                f"{self.name!r} has both a stack and a pipeline; give the stack alone, or call accelerate on the "
                "pipeline first and give the result"
            )

    @property
    def plain(self) -> bool:
        """Whether it is the experiment's own pipeline, untouched."""
        return self.stack is None and self.pipeline is None

    @property
    def method(self) -> Any:
        """What makes it faster, as JSON: the stack, or the class of a pipeline of its own; None where it is plain."""
        if self.pipeline is not None:
            return {"pipeline": type(self.pipeline).__name__}
        return None if self.stack is None else self.stack.to_json()

    @property
    def keeps_seed(self) -> bool:
        """Whether a seed still gives the plain pipeline's picture, so that the two can be compared by pixel."""
        return not any(Break.SEED_IMAGE in accelerator.effects.breaks for accelerator in self.stack or ())


def plain(steps: int, name: str | None = None) -> Configuration:
    """The untouched pipeline at this many steps."""
    return Configuration(name or f"{steps} steps", call={"num_inference_steps": steps})


class Experiment:
    """One pipeline, one list of prompts, one seed each: every configuration makes the same pictures, in turns.

    `call` holds the keyword arguments of all calls, and `encode` turns a round's prompts into those that depend on
    them (for pipelines that take embeddings). `batch` prompts make one round; the prompt's place in the list chooses
    its noise, so every configuration starts from the same.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        batch: int = 1,
        call: Mapping[str, Any] | None = None,
        encode: Callable[[Sequence[str]], Mapping[str, Any]] = lambda prompts: {"prompt": list(prompts)},
        judge: Judge | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not prompts or len(prompts) % batch:
            raise ValueError(f"the prompts must fill whole rounds of {batch}; got {len(prompts)}")
        self.pipeline, self.prompts, self.seed, self.batch = pipeline, tuple(prompts), seed, batch
        self.call, self.encode, self.judge = dict(call or {}), encode, judge
        self._progress = progress or (lambda phase, done, total: None)
        self._twins: dict[str, Any] = {}

    @property
    def rounds(self) -> int:
        return len(self.prompts) // self.batch

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device
        return device

    def task(self, configuration: Configuration) -> Task:
        """The call that makes one round's pictures."""
        pipeline = self._pipeline(configuration)
        return lambda number: self._generate(pipeline, configuration, number)

    def rival(self, accelerated: Configuration, *, rounds: int = 3) -> int:
        """The count of plain steps that takes as long as `accelerated`; see `equal_time_steps`."""
        self._progress("finding the equal-time rival", 0, 1)
        steps = equal_time_steps(
            lambda count: self.task(plain(count)), self.task(accelerated), rounds=rounds, device=self.device
        )
        self._progress("finding the equal-time rival", 1, 1)
        return steps

    def fastest(self, configurations: Sequence[Configuration], *, rounds: int = 2) -> Configuration:
        """The configuration of the lowest median time, by a short race after a warm-up."""
        seconds: dict[str, list[float]] = {}
        tasks = {configuration.name: self.task(configuration) for configuration in configurations}
        total = rounds * len(tasks)
        for done, sample in enumerate(interleave(tasks, rounds=rounds, device=self.device), start=1):
            seconds.setdefault(sample.task, []).append(sample.seconds)
            self._progress("finding the fastest stack", done, total)
        return min(configurations, key=lambda configuration: np.median(seconds[configuration.name]))

    def run(
        self, configurations: Sequence[Configuration], *, title: str, baseline: str, directory: Path | None = None
    ) -> tuple[Results, dict[str, list[Image]]]:
        """Run every configuration on every prompt, interleaved; give the results and all pictures.

        With a `directory`, the pictures of the first prompts are saved there.
        """
        records, flops = self._warm_up(configurations)
        images: dict[str, list[Image]] = {configuration.name: [] for configuration in configurations}
        seconds: dict[str, list[float]] = {configuration.name: [] for configuration in configurations}
        tasks = {configuration.name: self.task(configuration) for configuration in configurations}
        accelerated = {configuration.name for configuration in configurations if configuration.stack is not None}
        samples = interleave(tasks, rounds=self.rounds, warmup=0, seed=self.seed, device=self.device)
        for done, sample in enumerate(samples, start=1):
            images[sample.task] += sample.output
            seconds[sample.task].append(sample.seconds)
            if sample.task in accelerated:
                records[sample.task].append(self._twins[sample.task].fastdit.last_run)
            self._progress("measuring", done, self.rounds * len(tasks))
        results = Results(
            title=title,
            baseline=baseline,
            environment=Environment.capture(str(self.device)),
            settings=self._settings(),
            prompts=self.prompts,
            images_per_round=self.batch,
            configurations=tuple(
                self._result(configuration, seconds, records, flops, images, baseline, directory)
                for configuration in configurations
            ),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        return results, images

    def _pipeline(self, configuration: Configuration) -> Any:
        if configuration.stack is None:
            return self.pipeline if configuration.pipeline is None else configuration.pipeline
        if configuration.name not in self._twins:
            self._twins[configuration.name] = accelerate(self.pipeline, configuration.stack)
        return self._twins[configuration.name]

    def _generate(self, pipeline: Any, configuration: Configuration, number: int) -> list[Image]:
        first = number * self.batch
        places = range(first, first + self.batch)
        generators = [torch.Generator("cpu").manual_seed(self.seed + place) for place in places]
        call = {**self.encode(self.prompts[first : first + self.batch]), **self.call, **configuration.call}
        images: list[Image] = pipeline(generator=generators, **call).images
        return images

    def _warm_up(self, configurations: Sequence[Configuration]) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """Call every configuration once; give the records so far, and the FLOPs of a round where no record tells them.

        Plain ones are called through an empty stack, whose record tells what every round costs. Of a configuration
        with its own pipeline, the FLOPs of this first round stand for all.
        """
        records: dict[str, list[Any]] = {configuration.name: [] for configuration in configurations}
        flops: dict[str, int] = {}
        recorder = accelerate(self.pipeline, Stack())
        for done, configuration in enumerate(configurations, start=1):
            name = configuration.name
            pipeline = recorder if configuration.plain else self._pipeline(configuration)
            call = partial(self._generate, pipeline, configuration, 0)
            if configuration.pipeline is not None:
                flops[name] = _executed_flops(pipeline.transformer, call)
            else:
                call()
            if configuration.plain:
                records[name].append(pipeline.fastdit.last_run)
                flops[name] = pipeline.fastdit.last_run.flops
            self._progress("warm-up", done, len(configurations))
        return records, flops

    def _settings(self) -> dict[str, Any]:
        return {
            "pipeline": type(self.pipeline).__name__,
            "seed": self.seed,
            "call": {name: _plain_value(value) for name, value in self.call.items()},
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
        }

    def _result(
        self,
        configuration: Configuration,
        seconds: Mapping[str, list[float]],
        records: Mapping[str, list[Any]],
        flops: Mapping[str, int],
        images: Mapping[str, list[Image]],
        baseline: str,
        directory: Path | None,
    ) -> ConfigurationResult:
        name, runs = configuration.name, records[configuration.name]
        self._progress(f"scoring {name}", 0, 1)
        result = ConfigurationResult(
            name=name,
            stack=configuration.method,
            call={key: _plain_value(value) for key, value in configuration.call.items()},
            seconds=tuple(seconds[name]),
            flops=(flops[name],) * self.rounds if name in flops else tuple(run.flops for run in runs),
            metrics=self._metrics(configuration, images[name], images[baseline]),
            records=tuple(run.to_json() for run in runs[:SHOWN]),
            images=() if directory is None else save_images(images[name][:SHOWN], directory, name),
        )
        self._progress(f"scoring {name}", 1, 1)
        return result

    def _metrics(
        self, configuration: Configuration, images: Sequence[Image], references: Sequence[Image]
    ) -> dict[str, Metric]:
        samples: dict[str, list[float]] = {}
        if self.judge is not None:
            samples["judge"] = [float(score) for score in self.judge.score(images, self.prompts)]
        samples["sharpness"] = sharpness(images)
        if configuration.keeps_seed:
            samples["psnr"] = psnr(images, references)
            samples["ssim"] = ssim(images, references)
        return {name: Metric(mean(values), tuple(values)) for name, values in samples.items()}


def _executed_flops(module: torch.nn.Module, call: Callable[[], Any]) -> int:
    """The FLOPs that `module` really runs in `call`, in the measure of `fastdit.meter.count`."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        flops: int = sdpa_flop_count(query, key, value)
        return flops

    # The counter knows the attention of every device but the CPU.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        call()
    return sum(counter.get_flop_counts()[type(module).__name__].values())


def save_images(images: Sequence[Image], directory: Path, name: str) -> tuple[str, ...]:
    """Save pictures as PNG under `directory`/images; give their names relative to `directory`."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{stem}-{index}.png" for index in range(len(images))]
    for image, file_name in zip(images, names, strict=True):
        image.save(directory / file_name, optimize=True)
    return tuple(names)


def _plain_value(value: Any) -> Any:
    """A call's argument as JSON can hold it."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
