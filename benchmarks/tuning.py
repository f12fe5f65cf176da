"""Whether a search finds what hand-written presets are: on held-out prompts, at 3 and at 6 times the plain run's speed.

Each embedded pipeline is searched once, on training prompts, for a third of its plain run's seconds. The best stacks
found for a third and for a sixth, and every preset that is as fast, make the pictures of held-out prompts. A search has
found enough where no such preset is shown to be better. Exit 1 where one is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fastdit.bench.grammar import parse_stack
from fastdit.bench.source import Source
from fastdit.bench.tune import Goal, Search, Tried, Workbench
from fastdit.measure.statistics import mean_difference
from fastdit.mini.prompts import held_out, training
from fastdit.stack import Stack
from saving import save

FASTER = (3.0, 6.0)


def main(
    minutes: Annotated[float, typer.Option(help="Of each search.")] = 30.0,
    prompts: Annotated[int, typer.Option(help="Of the search.")] = 16,
    tested: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    only: str = "",
    folder: Path = Path("fastdit-tuning"),
    out: Path = Path("benchmarks/results/tuning.json"),
) -> None:
    """Search, then compare the winners with presets on prompts that the search has not seen."""
    found = []
    for name in (name for name in ("mini", "mini:sd3") if only in name):
        bench = Workbench(Source(name), training(prompts, 0, background=True), None, None)
        plain = median(bench.picture(bench.pipeline, number, None)[0] for number in range(4))
        search = Search(bench, Goal(seconds=plain / min(FASTER)), folder / name.replace(":", "-"))
        search.run(minutes, say=_say)
        for factor in FASTER:
            goal = plain / factor
            winner = Goal(seconds=goal).best(search.front())
            rows = [] if winner is None else _compared(search, winner, goal, tested)
            found.append({"pipeline": name, "factor": factor, "plain_seconds": plain, "rows": rows})
    save(out, {"minutes": minutes, "prompts": prompts, "tested": tested, "winners": found})
    lost = [row for one in found for row in one["rows"] if row["difference"]["high"] < 0]
    print(
        f"{len(found)} winners asked for, {sum(not one['rows'] for one in found)} not found; {len(lost)} presets better"
    )
    sys.exit(int(bool(lost) or any(not one["rows"] for one in found)))


def _say(told: str) -> None:
    print(told, flush=True)


def _compared(search: Search, winner: Tried, goal: float, tested: int) -> list[dict[str, Any]]:
    """Make held-out pictures by the winner and by the presets that are as fast; give what the winner is better by."""
    bench = Workbench(search.workbench.source, held_out(tested, 0, background=True), None, None, judged_for="tables")
    own = _made(bench, parse_stack(winner.stack))
    rows = []
    for preset in search.schedules:
        if preset in ("", "free"):
            continue
        tried = _made(bench, parse_stack(preset))
        if tried.seconds <= 1.05 * max(goal, own.seconds):
            difference = mean_difference(own.qualities, tried.qualities)
            rows.append({"winner": asdict(own), "preset": asdict(tried), "difference": asdict(difference)})
            _say(f"{winner.stack} beside {preset}: {difference:+.3f} in {own.seconds:.2f} and {tried.seconds:.2f} s")
    if not rows:
        rows.append({"winner": asdict(own), "preset": None, "difference": asdict(_alone(own.qualities))})
    return rows


def _alone(qualities: Sequence[float]) -> Any:
    return mean_difference(qualities, [0.0] * len(qualities))


def _made(bench: Workbench, stack: Stack) -> Tried:
    tried = bench.tried(stack)
    assert tried is not None
    return tried


if __name__ == "__main__":
    typer.run(main)
