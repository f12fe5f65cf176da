"""Thousands of random calls in one process, many of them broken off: every repeat gives the same bits, memory is flat.

A call draws a pipeline, a stack of the compatibility table, a size and a seed; half of the calls repeat an earlier one.
What a call gives is kept as a digest, so nothing that the process holds grows with the number of calls.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer

from combinations import STEPS, Names, combinations, pairs, stated
from common import keep_freed_memory
from fastdit.acceleration import accelerate
from fastdit.errors import FastditError
from fastdit.testing import PIPELINES, generate
from saving import save

MODELS = ("FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline")
#: How many twins are alive at a time; the others are dropped.
TWINS = 24


class Draw(NamedTuple):
    """What a call is made of."""

    model: str
    names: Names
    height: int
    seed: int


class Fault(Exception):
    """What a user's own code may raise."""


def raising(at: int, error: type[BaseException]) -> Callable[..., dict[str, Any]]:
    """Give a callback that raises after step `at`."""

    def callback(_: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise error
        return values

    return callback


@contextlib.contextmanager
def failing_block(transformer: torch.nn.Module, at: int) -> Iterator[None]:
    """Make the second block of the first list raise in its call number `at`."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise Fault

    handle = transformer.transformer_blocks[1].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def broken(kind: str, twin: Any, call: dict[str, Any], at: int) -> None:
    """Make a call that does not come to its end, or to no end that could be compared."""
    if kind == "a block raises":
        with failing_block(twin.fastdit.base.transformer, at):
            generate(twin, call)
    elif kind == "wrong arguments":
        generate(twin, {**call, "prompt_embeds": None})
    elif kind == "not finite":
        generate(twin, {**call, "prompt_embeds": call["prompt_embeds"] * float("nan")})
    elif kind == "interrupted":

        def stop(pipeline: Any, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = step >= at
            return values

        generate(twin, call, callback_on_step_end=stop)
    else:
        error = KeyboardInterrupt if kind == "an interrupt" else Fault
        generate(twin, call, callback_on_step_end=raising(at, error))


FAULTS = ("a callback raises", "an interrupt", "a block raises", "wrong arguments", "not finite", "interrupted")


class Soak:
    """One process's pipelines, its living twins, and the digests of what calls gave."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pipelines = {name: PIPELINES[name](steps=STEPS, batch=2, output_type="latent") for name in MODELS}
        every = dict.fromkeys([*combinations(), *pairs()])
        self.table = [names for names in every if not isinstance(stated(names), str)]
        self.twins: OrderedDict[tuple[str, Names], Any] = OrderedDict()
        self.digests: dict[Draw, str] = {}
        self.refused: set[tuple[str, Names]] = set()
        self.counts: Counter[str] = Counter()
        self.unequal: list[Draw] = []

    def step(self) -> None:
        """Draw a call and make it, in some way."""
        draw = self.draw()
        try:
            twin = self.twin(draw)
            call = {**self.pipelines[draw.model][1], "height": draw.height}
            if self.random.random() < 0.3:
                kind = self.random.choice(FAULTS)
                self.counts[kind] += 1
                with contextlib.suppress(Fault, KeyboardInterrupt, ValueError, TypeError):
                    broken(kind, twin, call, self.random.randrange(STEPS))
                return
            made = generate(twin, call, seeds=draw.seed)
        except FastditError:
            self.refused.add((draw.model, draw.names))
            self.counts["refused"] += 1
            return
        digest = hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest()
        known = self.digests.setdefault(draw, digest)
        self.counts["repeats" if known is not digest else "first calls"] += 1
        if known != digest:
            self.unequal.append(draw)

    def draw(self) -> Draw:
        """Draw a call that was made before, or any that was not refused."""
        if self.digests and self.random.random() < 0.5:
            return self.random.choice([*self.digests])
        while True:
            drawn = self.random.choice(MODELS), self.random.choice(self.table)
            if drawn not in self.refused:
                return Draw(*drawn, self.random.choice((64, 96)), self.random.randrange(2))

    def twin(self, draw: Draw) -> Any:
        """Give the twin of a stack, made anew where it was dropped."""
        key = draw.model, draw.names
        if key not in self.twins:
            self.twins[key] = accelerate(self.pipelines[draw.model][0], stated(draw.names))
            if len(self.twins) > TWINS:
                self.twins.popitem(last=False)
        return self.twins[key]


def resident() -> float:
    """Give the process's resident memory in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(
    calls: Annotated[int, typer.Option(help="How many calls.")] = 2000,
    seed: int = 0,
    out: Path = Path("benchmarks/results/soak.json"),
) -> None:
    """Make the calls; exit 1 where a repeat differs, or where memory grew by more than 1 % over the second half."""
    keep_freed_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    soak, memory, start = Soak(seed), [], time.perf_counter()
    for number in range(calls):
        soak.step()
        if number % 20 == 19:
            memory.append(resident())
        if number % 200 == 199:
            print(f"{number + 1} calls, {memory[-1]:.1f} MiB, {len(soak.unequal)} unequal", flush=True)
    quarter = len(memory) // 4
    third, last = median(memory[2 * quarter : 3 * quarter]), median(memory[3 * quarter :])
    growth = last / third - 1.0
    save(
        out,
        {
            "calls": calls,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "counts": dict(sorted(soak.counts.items())),
            "stacks": len({(draw.model, draw.names) for draw in soak.digests}),
            "unequal": soak.unequal,
            "memory_mib": memory,
            "growth_of_second_half": growth,
        },
    )
    print(f"{len(soak.unequal)} unequal, memory {third:.1f} MiB in the third quarter and {growth:+.2%} in the last")
    if soak.unequal or growth > 0.01:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
