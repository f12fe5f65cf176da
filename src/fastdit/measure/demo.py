"""What `fastdit demo` measures: an embedded pipeline on fixed prompts, plain and accelerated, in turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """The stacks of the demo."""
    full = {"num_inference_steps": FULL_STEPS}
    return [
        Configuration("TeaCache", Stack([TeaCache(0.25)]), full),
        Configuration("TeaCache, Taylor", Stack([TeaCache(0.25, forecast=Taylor(1))]), full),
        Configuration("Progressive 4x", Stack([ProgressiveResolution("4x")])),
        Configuration("Progressive 4x + TeaCache", Stack([ProgressiveResolution("4x"), TeaCache(0.25)])),
        Configuration("Progressive 7x + TeaCache", Stack([ProgressiveResolution("7x"), TeaCache(0.25)])),
    ]


def run_demo(
    directory: Path,
    *,
    extent: Extent,
    architecture: Architecture = "flux",
    seed: int = 0,
    progress: Progress = silent,
) -> Results:
    """Measure, and write pictures, results.json (after every round) and report.html into a directory that is there."""
    pipeline = load_mini(architecture)
    pipeline.set_progress_bar_config(disable=True)
    prompts = language_of(architecture).held_out(extent.prompts, seed, background=True)
    judge = judge_of(architecture, "tables")
    experiment = Experiment(pipeline, prompts, seed=seed, judge=judge, progress=progress)
    accelerated = accelerated_configurations()
    rival = experiment.rival(experiment.fastest(accelerated), rounds=extent.rival_rounds)
    full = plain(FULL_STEPS)
    counts = sorted({SHORT_STEPS, FEW_STEPS, rival} - {FULL_STEPS}, reverse=True)
    configurations = [full, *map(plain, counts), *accelerated]

    def keep(results: Results) -> None:
        results.save(directory / RESULTS)

    results, _ = experiment.run(
        configurations, title="fastdit demo", baseline=full.name, directory=directory, keep=keep
    )
    write_report(results, directory)
    return results
