"""What the cells of a group show: speed-ups with intervals, likeness to the full run, the rivals of the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median

from fastdit.bench.attribution import gains, interactions, quality_gains, subset_name, subsets
from fastdit.bench.experiment import FEWEST_ROUNDS, Experiment, Group, Row
from fastdit.bench.quality import fidelity, fidelity_by, quality
from fastdit.bench.store import Cell, Store
from fastdit.measure.charts import Waterfall
from fastdit.measure.experiment import SHOWN
from fastdit.measure.noise import too_noisy
from fastdit.measure.results import ConfigurationResult, JsonObject, Metric, Results
from fastdit.measure.statistics import Interval, ratio_of_medians

#: How far a rival's time may be from a stack's, as a part of it, for the two to be compared.
EQUAL_TIME = 0.1


@dataclass(frozen=True)
class RowOutcome:
    """What is known of a row.

    `speed_up` is to the plain pipeline's full run, None for itself and for too few rounds; `rival` names the plain
    run that takes as long; `metrics` holds PSNR (dB), SSIM and what else the experiment's `fidelity` names to the
    full run of the same seeds, and the judge's score of an embedded pipeline; `phases` are the seconds of loading,
    building and the first call; `notes` are what the library warned of.
    """

    row: Row
    rounds: int
    median_seconds: float | None
    speed_up: Interval | None
    flops: int | None
    bytes: int | None
    rival: str | None
    rival_seconds: float | None
    metrics: dict[str, Metric]
    phases: dict[str, float]
    notes: tuple[str, ...]
    error: str | None

    @property
    def shown(self) -> bool:
        """Whether the speed-up's interval leaves 1 out, and is not too wide to say how much."""
        found = self.speed_up
        return found is not None and not found.low <= 1.0 <= found.high and not too_noisy(found)

    def rejected(self, floor: float | None) -> bool:
        """Whether the row is not like enough to the full run."""
        return floor is not None and "ssim" in self.metrics and self.metrics["ssim"].interval.low < floor

    def status(self, floor: float | None = None) -> str:
        """Say in a word what came of the row."""
        if self.error is not None:
            return "failed"
        if self.speed_up is None:
            return "baseline" if self.row.name == "plain" else "too few rounds"
        if self.rejected(floor):
            return "rejected_quality"
        return ("faster" if self.speed_up.estimate > 1 else "slower") if self.shown else "not shown"


def outcomes(experiment: Experiment, group: Group, store: Store) -> list[RowOutcome]:
    """Tell what is known of every row of a group by now, the plain run first."""
    rows = experiment.rows(group) + (store.added(group) or [])
    cells = {row.name: store.cells(group, row) for row in rows}
    plain = rows[0]
    times = {name: median([cell.seconds for cell in own]) for name, own in cells.items() if own}
    found = []
    for row in rows:
        own, base = cells[row.name], cells[plain.name]
        common = min(len(own), len(base))
        speed_up = None
        if row is not plain and common >= FEWEST_ROUNDS:
            pair = [[cell.seconds for cell in some[:common]] for some in (base, own)]
            speed_up = ratio_of_medians(*pair)
        rival = _rival(rows, times, row)
        prepared = store.prepared(group, row) or {}
        found.append(
            RowOutcome(
                row,
                len(own),
                times.get(row.name),
                speed_up,
                own[0].flops if own else None,
                max((cell.bytes for cell in own if cell.bytes is not None), default=None),
                rival,
                None if rival is None else times[rival],
                ({} if row is plain else fidelity(store, group, (plain, base), (row, own), experiment.fidelity))
                | quality(store, group, (row, own)),
                prepared.get("seconds", {}),
                tuple(prepared.get("notes", ())),
                prepared.get("error"),
            )
        )
    return found


def _rival(rows: list[Row], times: dict[str, float], row: Row) -> str | None:
    """Name the fastest plain run that takes no less time than a stack, where it takes hardly more."""
    if row.plain or row.name not in times:
        return None
    goal = times[row.name]
    slower = [one.name for one in rows if one.plain and times.get(one.name, 0.0) >= goal * (1 - EQUAL_TIME / 3)]
    nearest = min(slower, key=lambda name: times[name], default=None)
    return nearest if nearest is not None and times[nearest] <= goal * (1 + EQUAL_TIME) else None


def results(experiment: Experiment, group: Group, store: Store, found: Sequence[RowOutcome]) -> Results:
    """Give a group's outcome as results, which the report shows: the rounds that every row has had.

    A row that failed, or is named after a part of a stack, is not among them.
    """
    shown = [one for one in found if one.error is None and (one.row.stack is None or one.row.name in experiment.stacks)]
    cells = {one.row.name: store.cells(group, one.row) for one in shown}
    rounds = min(map(len, cells.values()))
    first = cells[shown[0].row.name]
    return Results(
        title=group.title,
        baseline=shown[0].row.name,
        environment=store.environment(),
        settings={
            "command": store.command(),
            "pipeline": group.source.name,
            "seeds": list(experiment.seeds),
            "call": dict(experiment.call),
            "fidelity": fidelity_by(experiment.fidelity),
            "machines": store.machines(),
        },
        prompts=tuple(prompt for cell in first[:rounds] for prompt in cell.prompts),
        images_per_round=group.batch,
        configurations=tuple(_configuration(store, group, one, cells[one.row.name][:rounds]) for one in shown),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _configuration(store: Store, group: Group, one: RowOutcome, cells: list[Cell]) -> ConfigurationResult:
    pictures = [store.picture(group, one.row, name) for cell in cells for name in cell.pictures][:SHOWN]
    return ConfigurationResult(
        name=one.row.name,
        stack=_method(one.row),
        call={} if one.row.steps is None else {"num_inference_steps": one.row.steps},
        seconds=tuple(cell.seconds for cell in cells),
        flops=tuple(cell.flops for cell in cells if cell.flops is not None),
        metrics=one.metrics,
        records=tuple(cell.record for cell in cells[:SHOWN] if cell.record is not None),
        images=tuple(str(path.relative_to(store.directory)) for path in pictures),
    )


def _method(row: Row) -> JsonObject | None:
    """Give what makes a row faster; None where nothing does."""
    return {"peer": row.peer} if row.peer is not None else None if row.stack is None else row.stack.to_json()


def attribution(experiment: Experiment, group: Group, store: Store, name: str) -> list[str]:
    """Say what each part of a stack is worth, in time and in quality, from the rounds that every subset has had."""
    if len(experiment.stacks[name]) < 2:
        return []
    seconds = _of_subsets(experiment, group, store, name)
    if len(next(iter(seconds.values()))) < FEWEST_ROUNDS:
        return [f"{name}: too few rounds of its subsets to tell what its parts are worth"]
    names = [type(part).__name__ for part in experiment.stacks[name]]
    lines = []
    for gain in gains(names, seconds):
        worth = "; it gains nothing beside the others: dead weight" if gain.dead_weight else ""
        if gain.unsure:
            worth = "; whether it gains anything beside the others is too noisy to tell"
        own = f"{gain.alone:.2f} alone, {gain.last:.2f} added last, {gain.shapley:.2f} on average"
        lines.append(f"{name}: {gain.name} gains {own}{worth}")
    metric, scores = _scores_of_subsets(experiment, group, store, name)
    for gain in quality_gains(names, scores) if scores else ():
        own = f"{gain.alone:+.3f} alone, {gain.last:+.3f} added last, {gain.shapley:+.3f} on average"
        lines.append(f"{name}: {gain.name} changes {metric} by {own}")
    return lines + [f"{name}: {one}" for one in interactions(names, seconds)]


def waterfall(experiment: Experiment, group: Group, store: Store, name: str) -> Waterfall | None:
    """Give the way from the plain run's seconds to a stack's, by its parts' Shapley values; None for too few rounds."""
    if len(experiment.stacks[name]) < 2:
        return None
    seconds = _of_subsets(experiment, group, store, name)
    if len(next(iter(seconds.values()))) < FEWEST_ROUNDS:
        return None
    names = [type(part).__name__ for part in experiment.stacks[name]]
    told = [(gain.name, gain.shapley, gain.dead_weight) for gain in gains(names, seconds)]
    return Waterfall.of(name, median(seconds[frozenset()]), told)


def _rows_of_subsets(experiment: Experiment, group: Group, name: str) -> dict[frozenset[int], Row]:
    stack = experiment.stacks[name]
    rows = {row.name: row for row in experiment.rows(group)}
    every = frozenset(range(len(stack)))
    named = {parts: subset_name(name, stack, parts) for parts in subsets(stack)} | {every: name, frozenset(): "plain"}
    return {parts: rows[own] for parts, own in named.items()}


def _of_subsets(experiment: Experiment, group: Group, store: Store, name: str) -> dict[frozenset[int], list[float]]:
    """Give the seconds of every subset, as many rounds of each."""
    rows = _rows_of_subsets(experiment, group, name)
    seconds = {parts: [cell.seconds for cell in store.cells(group, row)] for parts, row in rows.items()}
    rounds = min(map(len, seconds.values()))
    return {parts: values[:rounds] for parts, values in seconds.items()}


def _scores_of_subsets(
    experiment: Experiment, group: Group, store: Store, name: str
) -> tuple[str, dict[frozenset[int], list[float]]]:
    """Give the judge's scores of every subset's pictures, or without a judge their SSIM; none for fewer than two."""
    rows = _rows_of_subsets(experiment, group, name)
    plain = rows[frozenset()], store.cells(group, rows[frozenset()])
    for metric, measured in (("the judge's score", quality), ("SSIM", None)):
        found = {}
        for parts, row in rows.items():
            own = row, store.cells(group, row)
            scores = (
                measured(store, group, own).get("judge") if measured else fidelity(store, group, plain, own)["ssim"]
            )
            if scores is not None:
                found[parts] = list(scores.samples)
        if len(found) == len(rows):
            count = min(map(len, found.values()))
            return metric, {parts: values[:count] for parts, values in found.items()} if count > 1 else {}
    return "", {}
