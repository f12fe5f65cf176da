"""What `fastdit demo` measures: an embedded pipeline on fixed prompts, plain and accelerated, in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from fastdit.engine.compile import Compile
from fastdit.errors import EngineBuildFailed
from fastdit.measure.experiment import Configuration, Experiment, plain
from fastdit.measure.report import write_report
from fastdit.measure.results import Results
from fastdit.measure.timing import Progress, silent
from fastdit.mini import Architecture, load_mini
from fastdit.mini.language import judge_of, language_of
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.stack import Stack
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.teacache import TeaCache

FULL_STEPS = 50  # the baseline of the RALU paper
SHORT_STEPS = 28  # what FLUX is commonly run with
PROBED_STEPS = 8  # beside `SHORT_STEPS`, to know what a step takes

#: A plain run stands beside a stack whose seconds it takes, or up to so much more.
LONGER = 0.08

REPORT, RESULTS = "report.html", "results.json"


@dataclass(frozen=True)
class Extent:
    """How much a demo measures: prompts (one round each), rounds of the search for the equal-time rival, and seconds.

    Where the prompts would take longer, there are fewer of them.
    """

    prompts: int
    rival_rounds: int
    seconds: float


EXTENTS = {
    "full": Extent(prompts=18, rival_rounds=5, seconds=210.0),
    "quick": Extent(prompts=6, rival_rounds=5, seconds=90.0),
}


def accelerated_configurations() -> list[Configuration]:
    """The stacks of the demo that run anywhere."""
    full = {"num_inference_steps": FULL_STEPS}
    seven, gentle = ProgressiveResolution("7x"), TeaCache(0.12, forecast=Taylor(1))
    return [
        Configuration("TeaCache", Stack([TeaCache(0.25)]), full),
        Configuration("TeaCache, Taylor", Stack([TeaCache(0.25, forecast=Taylor(1))]), full),
        Configuration("Progressive 4x", Stack([ProgressiveResolution("4x")])),
        Configuration("Progressive 7x + TeaCache, Taylor", Stack([seven, gentle])),
    ]


def with_engine() -> Configuration:
    """The stack of the demo that is compiled, which takes a C++ compiler and half a minute at first."""
    stack = Stack([TeaCache(0.25, forecast=Taylor(1)), Compile(packed=True)])
    return Configuration("TeaCache, Taylor, Compile", stack, {"num_inference_steps": FULL_STEPS})


def run_demo(
    directory: Path,
    *,
    extent: Extent,
    architecture: Architecture = "flux",
    seed: int = 0,
    progress: Progress = silent,
) -> Results:
    """Measure, and write pictures, results.json (after every round) and report.html into a directory that is there.

    A stack whose engine can't be built here is left out, and the results' settings say so.
    """
    until = time.monotonic() + extent.seconds
    pipeline = load_mini(architecture)
    pipeline.set_progress_bar_config(disable=True)
    prompts = language_of(architecture).held_out(extent.prompts, seed, background=True)
    judge = judge_of(architecture, "tables")
    experiment = Experiment(pipeline, prompts, seed=seed, judge=judge, progress=progress)
    accelerated, engine, left_out = accelerated_configurations(), with_engine(), None
    progress("compiling", 0, 1)
    try:
        engine.open(pipeline).fastdit.warmup()
        accelerated.append(engine)
    except EngineBuildFailed as error:
        left_out = f"{engine.name}, since {error}"
    progress("compiling", 1, 1)
    full = plain(FULL_STEPS)
    counts = sorted({SHORT_STEPS, *_rivals(experiment, accelerated, extent.rival_rounds)} - {FULL_STEPS}, reverse=True)
    configurations = [full, *map(plain, counts), *accelerated]

    def told(results: Results) -> Results:
        return replace(results, settings={**results.settings, "left_out": left_out} if left_out else results.settings)

    def keep(results: Results) -> None:
        told(results).save(directory / RESULTS)

    results, _ = experiment.run(
        configurations, title="fastdit demo", baseline=full.name, directory=directory, keep=keep, until=until
    )
    write_report(told(results), directory)
    return told(results)


def _rivals(experiment: Experiment, accelerated: list[Configuration], rounds: int) -> set[int]:
    """Give counts of plain steps that take as long as stacks: searched for the fastest one, estimated for others."""
    many, few = plain(SHORT_STEPS), plain(PROBED_STEPS)
    seconds = experiment.race([*accelerated, many, few])
    fastest = min(accelerated, key=lambda one: seconds[one.name])
    found = {experiment.rival(fastest, rounds=rounds)}
    # On a busy machine the longer run may seem to take no longer; a step takes something all the same.
    step = max((seconds[many.name] - seconds[few.name]) / (SHORT_STEPS - PROBED_STEPS), seconds[few.name] / SHORT_STEPS)
    for own in sorted((seconds[one.name] for one in accelerated if one is not fastest), reverse=True):
        taken = [seconds[few.name] + (count - PROBED_STEPS) * step for count in (*found, SHORT_STEPS)]
        if not any(own <= other <= own * (1.0 + LONGER) for other in taken):
            found.add(min(max(ceil(PROBED_STEPS + (own - seconds[few.name]) / step), 1), FULL_STEPS))
    return found
