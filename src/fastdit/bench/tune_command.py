"""`fastdit tune`: searches for the stack for a time, a quality, or a number of computed steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdit.bench.command import pixels, run_experiment
from fastdit.errors import InvalidConfig
from fastdit.mini.language import language_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdit.bench.source import Source
    from fastdit.bench.workers import Workers
    from fastdit.measure.results import Results

#: Prompts of an embedded pipeline: those of the search, and those of the report.
SEARCHED, REPORTED = 16, 16


def tune(
    pipe: Annotated[str, typer.Argument(help="mini, mini:sd3, a folder, or a hub's name.")],
    seconds: Annotated[float | None, typer.Option(help="A call takes at most so long.")] = None,
    floor: Annotated[float | None, typer.Option(help="Quality of at least this: the judge, or SSIM.")] = None,
    budget: Annotated[int | None, typer.Option(help="Search a mask of exactly so many computed steps.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="To search with, one a line.")] = None,
    test_prompts: Annotated[Path | None, typer.Option(help="For the report alone, one a line.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 512, or 512x768 for height x width.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of stacks without a schedule; the pipeline's own.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="An engine to try, such as Compile.")] = None,
    minutes: Annotated[float, typer.Option(help="How long trials begin for.")] = 30.0,
    report_minutes: Annotated[float, typer.Option(help="How long the report's rounds go on for; 0 for none.")] = 5.0,
    trials: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster for the trials: auto, HOST:PORT, or local.")] = None,
    dtype: str | None = None,
    device: str | None = None,
    out: Annotated[Path, typer.Option(help="Study, stacks and report; the same again goes on.")] = Path("fastdit-tune"),
) -> None:
    """Search for a stack on training prompts, save the best ones, and report them on prompts held out."""
    from fastdit.bench.cluster import workers_at
    from fastdit.bench.source import Source

    source = Source(pipe, dtype=dtype, device=device)  # type: ignore[arg-type]
    searched, reported = _prompts(source, prompts, test_prompts)
    if shared := set(searched) & set(reported):
        raise InvalidConfig(f"what is searched with is not what is reported, and both have {sorted(shared)[0]!r}")
    shape = None if size is None else pixels(size)
    if budget is not None and ray is not None:
        raise InvalidConfig("a mask of a budget is searched on one machine, without --ray")
    best: tuple[str, Path] | None = None
    with workers_at(ray) as workers:
        if budget is not None:
            stacks = _budget(source, searched, budget, shape, (steps, trials, out))
        else:
            from fastdit.bench.tune import Goal, Search, Workbench, optuna

            optuna()
            goal = Goal(seconds, floor)
            search = Search(Workbench(source, searched, shape, steps), goal, out, engine or (), seed, workers)
            search.run(minutes, trials, typer.echo)
            winner = goal.best(search.front())
            cliffs = [] if winner is None else search.cliffs(winner)
            saved = search.save(winner, cliffs)
            for one, path in zip(search.front(), saved, strict=True):
                typer.echo(f"{path}: {one.stack or 'plain'}, {one.seconds:.2f} s, quality {one.quality:.3f}")
            for cliff in cliffs:
                typer.echo(f"beside the winner: {cliff}")
            if winner is None:
                typer.echo(f"nothing reaches the goal ({search.counted()}); search longer, or ask for less")
            elif not winner.stack:
                less = "--floor" if goal.seconds is None else "--seconds"
                typer.echo(f"the goal is reached by plain sampling, {winner.seconds:.3f} s; choose another {less}")
            stacks = {one.stack: path for one, path in zip(search.front(), saved, strict=True) if one.stack}
            if winner is not None and winner.stack:
                best = winner.stack, stacks[winner.stack]
        if stacks and reported and report_minutes > 0:
            measured = _report(source, stacks, reported, (shape, steps, report_minutes), out, workers)
            if best is not None and seconds is not None and measured is not None:
                for line in fewer_steps(measured, best[0], seconds):
                    typer.echo(line)
    if best is not None:
        typer.echo(f'The winner is {best[0]}: accelerate(pipe, Stack.from_pretrained("{best[1]}"))')


def _budget(source: Source, searched: list[str], budget: int, shape: Any, asked: Any) -> dict[str, Path]:
    from fastdit.bench.budget import Budget

    steps, trials, out = asked
    pipeline = source.load()
    if steps is None:
        from fastdit.models.components import arguments_of

        steps = arguments_of(pipeline)["num_inference_steps"]
    more = {} if shape is None else {"height": shape[0], "width": shape[1]}
    calls = [{"prompt": prompt, **more} for prompt in searched[:4]]
    found = Budget(budget, **({} if trials is None else {"trials": trials})).search(pipeline, calls, steps)
    path = out / f"budget-{budget}"
    found.save(path)
    computed = [step for step, run in enumerate(found.mask.mask) if run]
    typer.echo(
        f"{path}: computes steps {computed}, {found.error:.3f} from the full run (even: {found.uniform_error:.3f})"
    )
    return {f"budget {budget}": path}


def _prompts(source: Source, file: Path | None, test: Path | None) -> tuple[list[str], list[str]]:
    """Give the prompts of the search and those of the report."""
    if source.architecture is not None and file is None and test is None:
        language = language_of(source.architecture)
        return language.training(SEARCHED, 0, background=True), language.held_out(REPORTED, 0, background=True)
    if file is None:
        raise InvalidConfig(f"{source.name} needs --prompts to search with, and --test-prompts for the report")
    return _lines(file), [] if test is None else _lines(test)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{file} can't be read: {error}") from error


def _report(
    source: Source,
    stacks: dict[str, Path],
    prompts: list[str],
    asked: tuple[Any, ...],
    out: Path,
    workers: Workers | None,
) -> Results | None:
    """Measure what was found on the prompts of the report, print and write it; None where nothing was finished."""
    from fastdit.bench.experiment import Experiment
    from fastdit.bench.outcome import outcomes, results
    from fastdit.bench.store import Store
    from fastdit.stack import Stack

    shape, steps, minutes = asked
    experiment = Experiment(
        (source,),
        {name: Stack.from_pretrained(path) for name, path in stacks.items()},
        tuple(prompts),
        sizes=None if shape is None else (shape,),
        steps=None if steps is None else (steps,),
        minutes=minutes,
    )
    store = Store(out / "report")
    run_experiment(experiment, store, False, workers)
    group = next(experiment.groups())
    rows = outcomes(experiment, group, store)
    finished = any(row.rounds for row in rows if not row.row.plain)
    return results(experiment, group, store, rows) if finished else None


def fewer_steps(measured: Results, winner: str, goal: float) -> Iterator[str]:
    """Say how a winner compares with the most plain steps that reach the goal in seconds, too, if any do."""
    from fastdit.measure.table import verdict

    plain = [one for one in measured.configurations if one.stack is None and one.median_seconds <= goal]
    if not plain:
        return
    rival = max(plain, key=lambda one: one.median_seconds)
    metric = next((name for name in ("judge", "ssim") if name in measured[winner].metrics), None)
    advantage = None if metric is None else measured.advantage(winner, rival.name, metric)
    said = {"wins": "is better", "loses": "is worse, so take that"}.get(verdict(advantage), "is not shown to be better")
    yield (
        f"{rival.name} takes {rival.median_seconds:.3f} s, which reaches the goal, too; the winner {said}"
        + ("" if advantage is None else f" ({metric} {advantage:+.3f})")
    )
