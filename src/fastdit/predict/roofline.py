"""Seconds without the machine: a published model on a published card, by FLOPs and bytes.

    seconds = FLOPs / (compute * peak FLOPs a second) + bytes / (memory * peak bytes a second)

The two constants, which say how much of its data sheet a card reaches, are fitted on some rows of published tables and
tried on the others. It is a prediction, and its error on those is printed beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import mean

import numpy as np

from fastdit.errors import InvalidConfig
from fastdit.plan import Plan
from fastdit.predict.architectures import TOKEN_PIXELS, Architecture, Work, architecture, published
from fastdit.predict.estimate import Expected, shares_of
from fastdit.stack import Stack
from fastdit.step import StagePlan

TERA = 1e12


@dataclass(frozen=True)
class Roofline:
    """The shares of a card's peaks that are reached."""

    compute: float
    memory: float

    def seconds(self, work: Work, machine: str) -> float:
        """Say how long a step's work takes. Raises `InvalidConfig` for an unknown machine."""
        known = published()["machines"]
        if machine not in known:
            raise InvalidConfig(f"the machines are {', '.join(known)}, got {machine!r}")
        peaks = known[machine]
        arithmetic: float = work.flops / (self.compute * peaks["flops"])
        traffic: float = work.bytes / (self.memory * peaks["bytes"])
        return arithmetic + traffic


@dataclass(frozen=True)
class Trial:
    """A published row: what was measured, what is said of it, and whether the constants were fitted to it."""

    what: str
    measured: float
    said: float
    fitted: bool

    @property
    def error(self) -> float:
        return abs(self.said / self.measured - 1.0)


def kept() -> tuple[Roofline, float]:
    """Give the constants as they were fitted, with the mean error on rows that they were not fitted to.

    `benchmarks/prediction.py` writes them into the published facts.
    """
    found = published()["roofline"]
    return Roofline(found["compute"], found["memory"]), found["error"]


@functools.cache
def fitted() -> Roofline:
    """Fit the two constants on the rows of the tables that are for it, by least squares of the relative error."""
    rows = [row for row in published()["steps"] if row["fitted"]]
    features = []
    for row in rows:
        work, peaks = architecture(row["model"]).work(_tokens(1024, 1024)), published()["machines"][row["machine"]]
        features.append([work.flops / peaks["flops"], work.bytes / peaks["bytes"]])
    seconds = np.array([row["seconds"] for row in rows])
    slow = np.linalg.lstsq(np.array(features) / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    if (slow <= 0).any():
        raise ValueError(f"the published rows give no roofline: {slow}")
    return Roofline(*(1.0 / slow).tolist())


def trials() -> list[Trial]:
    """Try the constants on every published row: seconds a step, and gains against the plain run."""
    own, found = fitted(), []
    for row in published()["steps"]:
        work = architecture(row["model"]).work(_tokens(1024, 1024))
        what = f"{row['model']} on {row['machine']}, seconds a step"
        found.append(Trial(what, row["seconds"], own.seconds(work, row["machine"]), row["fitted"]))
    for row in published()["gains"]:
        made = architecture(row["model"])
        each = {tokens: own.seconds(made.work(tokens), "h100") for _, tokens, _ in row["stages"]}
        steps = sum(count for count, _, _ in row["stages"])
        spent = sum(count * share * each[tokens] for count, tokens, share in row["stages"])
        found.append(Trial(row["what"], row["gain"], steps * max(each.values()) / spent, False))
    return found


def held_out_error() -> float:
    """Give the mean relative error on the rows that nothing was fitted to."""
    return mean(trial.error for trial in trials() if not trial.fitted)


@dataclass(frozen=True)
class MachinePrediction:
    """What is predicted of a published model on a published machine."""

    model: str
    machine: str
    plan: Plan
    seconds: Expected
    flops: Expected
    weights: int
    error: float

    def lines(self) -> tuple[str, ...]:
        """Say it, with its error."""
        flops = Expected(*(value / TERA for value in (self.flops.value, self.flops.low, self.flops.high)))
        return (
            f"predicted for {self.model} on {self.machine}, without it: {self.seconds:.3g} s and {flops:.4g} TFLOPs in "
            f"the transformer, {self.weights / 1e9:.3g} GB of its weights",
            f"a prediction by a roofline, which errs by {self.error:.0%} on published rows that it was not fitted to; "
            "text encoders, autoencoder and engines are not in it",
        )


def predict_on(
    model: str, machine: str, stack: Stack, size: tuple[int, int] | None = None, steps: int | None = None
) -> MachinePrediction:
    """Predict a stack on a published model and machine.

    Raises `InvalidConfig` for unknown names, and for what the stack's schedule can't be planned for.
    """
    made, (reached, error) = architecture(model), kept()
    height, width = size or (1024, 1024)
    plan = _plan(made, stack, (height, width), steps)
    seconds = flops = Expected(0.0, 0.0, 0.0)
    shares = iter(shares_of(plan, made.transformer, None, sum(made.depths.values())))
    for stage in plan.stages:
        work = made.work(stage.tokens or 0)
        each = reached.seconds(work, machine)
        for _ in range(stage.steps):
            spent = next(shares).blocks
            seconds += Expected(each * spent.value, each * spent.low, each * spent.high)
            flops += Expected(work.flops * spent.value, work.flops * spent.low, work.flops * spent.high)
    return MachinePrediction(model, machine, plan, seconds, flops, made.weights, error)


def _plan(made: Architecture, stack: Stack, size: tuple[int, int], steps: int | None) -> Plan:
    rows, columns = (side // TOKEN_PIXELS for side in size)
    if stack.schedule is not None:
        scheduled = stack.schedule.plan(rows, columns, steps)
        return Plan(stack, scheduled.stages, scheduled.notes)
    return Plan(stack, (StagePlan(0, "whole frame", rows * columns, steps or made.steps),))


def _tokens(height: int, width: int) -> int:
    return (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
