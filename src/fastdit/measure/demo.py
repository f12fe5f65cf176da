"""What `fastdit demo` measures: an embedded pipeline on fixed prompts, plain and accelerated, in turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
FEW_STEPS = 15  # near the time of ProgressiveResolution "4x" and of TeaCache, so that these have a rival of their own

REPORT, RESULTS = "report.html", "results.json"


@dataclass(frozen=True)
class Extent:
    """How much a demo measures: prompts (one round each), and rounds of the search for the equal-time rival."""

    prompts: int
    rival_rounds: int


EXTENTS = {"full": Extent(prompts=18, rival_rounds=7), "quick": Extent(prompts=6, rival_rounds=5)}


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
    rival = experiment.rival(experiment.fastest(accelerated), rounds=extent.rival_rounds)
    full = plain(FULL_STEPS)
    counts = sorted({SHORT_STEPS, FEW_STEPS, rival} - {FULL_STEPS}, reverse=True)
    configurations = [full, *map(plain, counts), *accelerated]

    def told(results: Results) -> Results:
        return replace(results, settings={**results.settings, "left_out": left_out} if left_out else results.settings)

    def keep(results: Results) -> None:
        told(results).save(directory / RESULTS)

    results, _ = experiment.run(
        configurations, title="fastdit demo", baseline=full.name, directory=directory, keep=keep
    )
    write_report(told(results), directory)
    return told(results)
