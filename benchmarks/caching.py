"""Caches at equal time on the embedded pipeline: fastdit's, other libraries' in the same run, and fewer plain steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from common import compare
from fastdit.accelerator import Accelerator
from fastdit.measure.experiment import Configuration, plain
from fastdit.measure.table import rich_table
from fastdit.stack import Stack
from fastdit.step_cache.forecasters.dmd import DMD
from fastdit.step_cache.forecasters.foca import FoCa
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.easycache import EasyCache
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.interval import Interval
from fastdit.step_cache.gates.magcache import MagCache
from fastdit.step_cache.gates.seacache import SeaCache
from fastdit.step_cache.gates.teacache import TeaCache
from fastdit.step_cache.policy import SkipPolicy
from fastdit.token_cache.clusca import ClusCa
from fastdit.token_cache.duca import DuCa
from fastdit.token_cache.toca import ToCa
from peers import STEPS
from peers import configurations as peer_configurations

#: The plain runs: the baseline, and the rivals around 1.5, 2 and 3 times its speed.
PLAIN = (50, 33, 25, 18, 15)


def stacks() -> dict[str, list[Accelerator]]:
    """fastdit's caches, several settings each."""
    spaced, free = SkipPolicy(first=3, last=0), SkipPolicy()
    return {
        "TeaCache .2": [TeaCache(0.2)],
        "TeaCache .12, Taylor 1": [TeaCache(0.12, forecast=Taylor(1))],
        "TeaCache .18, Taylor 1": [TeaCache(0.18, forecast=Taylor(1))],
        "TeaCache .12, FoCa": [TeaCache(0.12, forecast=FoCa())],
        "TeaCache .18, FoCa": [TeaCache(0.18, forecast=FoCa())],
        "TeaCache .3, Taylor 1": [TeaCache(0.3, forecast=Taylor(1))],
        "TeaCache .3, FoCa": [TeaCache(0.3, forecast=FoCa())],
        "SeaCache .1, Taylor 1": [SeaCache(0.1, forecast=Taylor(1), policy=free)],
        "FirstBlockCache .09, Taylor 1": [FirstBlockCache(0.09, forecast=Taylor(1))],
        "EasyCache .05, Taylor 1": [EasyCache(0.05, forecast=Taylor(1))],
        "MagCache .06, Taylor 1": [MagCache(0.06, forecast=Taylor(1))],
        "Interval 3, Taylor 1": [Interval(3, forecast=Taylor(1), policy=spaced)],
        "Interval 4, Taylor 1": [Interval(4, forecast=Taylor(1), policy=spaced)],
        "Interval 3, DMD": [Interval(3, forecast=DMD(4), policy=spaced)],
        "ToCa 3": [ToCa(3)],
        "DuCa 4": [DuCa(4)],
        "ClusCa 3": [ClusCa(3)],
    }


def configurations() -> list[Configuration]:
    """Everything that takes its turn in a round."""
    call = {"num_inference_steps": STEPS}
    own = [Configuration(name, Stack(stack), call) for name, stack in stacks().items()]
    return [*map(plain, PLAIN), *own, *peer_configurations()]


def main(
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 40,
    batch: int = 8,
    seed: int = 0,
    out: Path = Path("benchmarks/results/caching.json"),
) -> None:
    """Generate, time and score everything in turns."""
    results = compare(configurations(), title="caches at equal time", prompts=prompts, batch=batch, seed=seed)
    Console(width=200).print(rich_table(results))
    results.save(out)


if __name__ == "__main__":
    np.seterr(all="raise")
    typer.run(main)
