"""The `fastdit` command. Torch is imported inside the commands, so that help and version answer at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastdit

if TYPE_CHECKING:
    from rich.console import Console

    from fastdit.measure.experiment import Progress

#: Characters that the table needs to hold every cell on one line.
WIDE = 150

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Accelerators for diffusers pipelines that compose, and an honest bench for them."""
    # Transformers remarks on optional packages at import, which a command's output is no place for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fastdit.__version__)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where pictures, results.json and report.html go.")] = Path(
        "fastdit-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts: about a minute, wider intervals.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the prompts and the noise.")] = 0,
) -> None:
    """Make pictures with the embedded pipeline, plain and accelerated, and report speed and quality."""
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        from fastdit.measure.demo import EXTENTS, REPORT, RESULTS, run_demo
        from fastdit.measure.statistics import CONFIDENCE
        from fastdit.measure.table import rich_table
    except ModuleNotFoundError as error:
        errors.print(f"The demo needs {error.name}: pip install 'fastdit\\[demo]'")
        raise typer.Exit(1) from error

    with _progress(errors) as progress:
        results = run_demo(out, extent=EXTENTS["quick" if quick else "full"], seed=seed, progress=progress)
    if as_json:
        typer.echo(results.dumps())
        return
    console = Console()
    console.print(rich_table(results, narrow=console.width < WIDE))
    console.print(
        f"Measured on {results.environment}; {len(results.prompts)} prompts, brackets hold {CONFIDENCE:.0%} intervals."
    )
    console.print(f"Report: {out / REPORT}   Numbers: {out / RESULTS}")


@app.command()
def plan(
    stack: Annotated[
        Path | None, typer.Argument(help="A saved stack's directory; without it, RALU 4x and TeaCache are planned.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; the schedule's own if left out.")] = None,
) -> None:
    """Print what a stack would do in a call of the embedded pipeline, without running it."""
    from fastdit import RALU, Stack, TeaCache, load_mini

    chosen = Stack([RALU("4x"), TeaCache()]) if stack is None else Stack.from_pretrained(stack)
    typer.echo(chosen.explain(load_mini(), height, width, steps))


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for every phase of a measurement, on a console that is not the results' own."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show
