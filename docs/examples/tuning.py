"""Find a stack for so many seconds a picture, keep it, and see on other prompts what it is worth.

pip install 'fastdit[tune]'
python docs/examples/tuning.py --seconds 1.5 --minutes 10 --out found
python docs/examples/tuning.py --seconds 1.5 --minutes 10 --out found  # goes on with the same search
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from fastdit import Stack, accelerate, load_mini
from fastdit.bench.source import Source
from fastdit.bench.tune import Goal, Search, Workbench
from fastdit.mini.judge import load_judge
from fastdit.mini.prompts import held_out, training

#: Prompts to search with, and others to report on.
SEARCHED, REPORTED = 8, 8


def found(goal: Goal, minutes: float, size: int, out: Path) -> Path | None:
    """Search, and give the folder of the stack that reaches the goal best; None where none does."""
    workbench = Workbench(Source("mini"), training(SEARCHED, 0, background=True), (size, size), None)
    search = Search(workbench, goal, out)
    search.run(minutes, say=print)
    winner = goal.best(search.front())
    if winner is None:
        return None
    cliffs = search.cliffs(winner)
    print(*cliffs, sep="\n")
    paths = search.save(winner, cliffs)
    return next(path for path in paths if path.name.endswith("-winner"))


def reported(pipeline: Any, size: int) -> tuple[float, float]:
    """Give the seconds a picture and the judge's score on prompts that no search has seen."""
    seconds, scores, judge = [], [], load_judge()
    for seed, prompt in enumerate(held_out(REPORTED, 0, background=True)):
        start = time.perf_counter()
        image = pipeline(prompt, height=size, width=size, generator=torch.Generator().manual_seed(seed)).images[0]
        seconds.append(time.perf_counter() - start)
        scores.append(float(judge.score([image], [prompt])[0]))
    return median(seconds), mean(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a picture, at most")
    parser.add_argument("--minutes", type=float, default=10.0, help="of searching")
    parser.add_argument("--size", type=int, default=256, help="pixels on a side")
    parser.add_argument("--out", type=Path, default=Path("found"))
    asked = parser.parse_args()
    folder = found(Goal(seconds=asked.seconds), asked.minutes, asked.size, asked.out)
    if folder is None:
        raise SystemExit("nothing reaches the goal yet: search longer, or ask for less")
    pipeline = load_mini()
    pipeline.set_progress_bar_config(disable=True)
    for name, one in (("plain", pipeline), (str(folder), accelerate(pipeline, Stack.from_pretrained(folder)))):
        print("{}: {:.2f} s a picture, judge {:.3f}".format(name, *reported(one, asked.size)))


if __name__ == "__main__":
    main()
