"""Whether a search finds what hand-written presets are: on held-out prompts, at 3 and at 6 times the plain run's speed.

Each embedded pipeline is searched once, on training prompts, for a third of its plain run's seconds. The best stacks
found for a third and for a sixth, every preset that is as fast, and plain steps of their time make the pictures of
held-out prompts. A search has found enough where no such preset is shown to be better. Exit 1 where one is.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fastdit.bench.grammar import parse_stack
from fastdit.bench.source import Source
from fastdit.bench.tune import Goal, Search, Tried, Workbench
from fastdit.measure.statistics import mean_difference
from fastdit.mini.prompts import held_out, training
from fastdit.models.components import arguments_of
from saving import save

FASTER = (3.0, 6.0)


def main(
    minutes: Annotated[float, typer.Option(help="Of each search.")] = 30.0,
    prompts: Annotated[int, typer.Option(help="Of the search.")] = 16,
    tested: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    only: Annotated[str, typer.Option(help="One of the pipelines: mini, or mini:sd3.")] = "",
    folder: Path = Path("fastdit-tuning"),
    out: Annotated[Path, typer.Option(help="A folder, for a file of each pipeline.")] = Path("benchmarks/results"),
) -> None:
    """Search, then compare the winners with presets on prompts that the search has not seen."""
    missed, lost = 0, 0
    for name in (name for name in ("mini", "mini:sd3") if only in ("", name)):
        bench = Workbench(Source(name), training(prompts, 0, background=True), None, None)
        plain = median(bench.picture(bench.pipeline, number, None)[0] for number in range(4))
        search = Search(bench, Goal(seconds=plain / min(FASTER)), folder / name.replace(":", "-"))
        search.run(minutes, say=_say)
        held = Held(search, plain, tested)
        found = [held.compared(factor) for factor in FASTER]
        missed += sum(one["winner"] is None for one in found)
        lost += sum(row["difference"]["high"] < 0 for one in found for row in one["presets"])
        trials = {"minutes": minutes, "trials": len(search.study.trials), "finished": len(search.finished())}
        asked = {"pipeline": name, "prompts": prompts, "tested": tested, "plain_seconds": plain}
        save(out / f"tuning-{name.replace(':', '-')}.json", {**asked, **trials, "winners": found})
    print(f"{missed} winners not found, {lost} presets better than the winner at their speed")
    sys.exit(int(bool(lost or missed)))


def _say(told: str) -> None:
    print(told, flush=True)


class Held:
    """A search's winners, and what stands beside them, on prompts and by the judge that no search has seen."""

    def __init__(self, search: Search, plain: float, tested: int) -> None:
        self.search, self.plain = search, plain
        prompts, source = held_out(tested, 0, background=True), search.workbench.source
        self.open = partial(Workbench, source, prompts, None, judged_for="tables")
        bench, presets = self.open(None), (one for one in search.schedules if one and not one.startswith("free"))
        self.presets = [_made(bench, preset) for preset in presets]

    def compared(self, factor: float) -> dict[str, Any]:
        """Give the winner for a speed, the presets that are as fast, and plain steps of its time, all with pictures."""
        goal = self.plain / factor
        winner = Goal(seconds=goal).best(self.search.front())
        found: dict[str, Any] = {"factor": factor, "winner": None, "presets": [], "plain": None}
        if winner is None:
            return found
        own = _made(self.open(None), winner.stack)
        found["winner"] = asdict(own)
        for preset in self.presets:
            if preset.seconds <= 1.05 * max(goal, own.seconds):
                found["presets"].append({"made": asdict(preset), **_better(own, preset, preset.stack)})
        full = arguments_of(self.search.workbench.pipeline)["num_inference_steps"]
        steps = max(ceil(full * own.seconds / self.plain), 1)
        fewer = _made(self.open(steps), "")
        found["plain"] = {"steps": steps, "made": asdict(fewer), **_better(own, fewer, f"{steps} plain steps")}
        return found


def _made(bench: Workbench, stack: str) -> Tried:
    tried = bench.tried(parse_stack(stack))
    assert tried is not None
    return tried


def _better(own: Tried, other: Tried, name: str) -> dict[str, Any]:
    """Give what a winner's pictures are better by."""
    difference = mean_difference(own.qualities, other.qualities)
    _say(f"{own.stack} beside {name}: {difference:+.3f} in {own.seconds:.2f} and {other.seconds:.2f} s")
    return {"difference": asdict(difference)}


if __name__ == "__main__":
    typer.run(main)
