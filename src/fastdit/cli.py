"""The `fastdit` command. Torch is imported inside the commands, so that help and version answer at once."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fastdit
from fastdit.errors import FastditError, InvalidConfig

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from rich.console import Console
    from rich.progress import TaskID

    from fastdit.measure.timing import Progress
    from fastdit.step_cache.coefficients import Coefficients
    from fastdit.step_cache.curves import MagnitudeCurve

#: Characters that the table needs to hold every cell on one line.
WIDE = 150

PIXELS = "Pixels; the pipeline's own if left out."

#: Prompts that the embedded pipeline is calibrated on by default.
MINI_PROMPTS = 16


class Method(str, enum.Enum):
    """What can be calibrated."""

    TEACACHE = "teacache"
    MAGCACHE = "magcache"


app = typer.Typer(no_args_is_help=True, add_completion=False)
engines = typer.Typer(no_args_is_help=True, help="List or remove the engines that are kept on disk.")
app.add_typer(engines, name="engines")
Kept = Annotated[Path | None, typer.Option("--directory", help="Where they are kept; fastdit's own cache if left out.")]


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
        Path | None,
        typer.Argument(
            help="A saved stack's directory; without it, ProgressiveResolution 4x and TeaCache are planned."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help=PIXELS)] = None,
    width: Annotated[int | None, typer.Option(help=PIXELS)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; the schedule's own if left out.")] = None,
) -> None:
    """Print what a stack would do in a call of the embedded pipeline, without running it."""
    from fastdit import ProgressiveResolution, Stack, TeaCache, load_mini

    chosen = Stack([ProgressiveResolution("4x"), TeaCache()]) if stack is None else Stack.from_pretrained(stack)
    typer.echo(chosen.explain(load_mini(), height, width, steps))


@app.command()
def matrix(
    only: Annotated[str, typer.Argument(help="A part of the pipelines' names; all if left out.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, and nothing else.")] = False,
) -> None:
    """Run tiny models of the installed diffusers' pipelines, and print what works with which."""
    from fastdit.measure.support import pipeline_classes, supported, table

    rows = [supported(pipeline) for pipeline in pipeline_classes() if only.lower() in pipeline.__name__.lower()]
    typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else table(rows))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measure what TeaCache or MagCache must know of a model, in runs that skip nothing."""

    pipe: Annotated[str, typer.Argument(help="'mini' (the embedded pipeline), or a directory or hub name to load.")]
    method: Annotated[Method, typer.Option(help="The accelerator whose numbers are measured.")]
    out: Annotated[Path, typer.Option(help="The JSON file to write.")]
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None
    steps: Annotated[
        list[int] | None,
        typer.Option(help="The pipeline's own if left out. teacache takes several: --steps 50 --steps 28."),
    ] = None
    height: Annotated[int | None, typer.Option(help=PIXELS)] = None
    width: Annotated[int | None, typer.Option(help=PIXELS)] = None
    guidance: Annotated[float | None, typer.Option(help="guidance_scale; the pipeline's own if left out.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32 (a CPU's default), bfloat16 (others') or float16.")] = None
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None
    signal: Annotated[str | None, typer.Option(help="What TeaCache watches; 'modulated' if left out.")] = None
    seed: Annotated[int, typer.Option(help="Chooses the noise.")] = 0

    def run(self, progress: Progress) -> tuple[Coefficients | MagnitudeCurve, str]:
        """Measure; give the numbers, and the line of Python that uses them. Nothing is run before all is checked."""
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            directory = self.out.absolute().parent
            reason = "is a directory" if self.out.is_dir() else f"can't be written: there is no directory {directory}"
            raise InvalidConfig(f"--out {self.out} {reason}; give a file's name in a directory that exists")
        if self.signal is not None and self.method is not Method.TEACACHE:
            raise InvalidConfig(f"--signal is TeaCache's, and {self.method.value} watches none; leave it out")
        texts = read_prompts(self.pipe, self.prompts)
        from fastdit.measure.calibration import calibrate_magcache, calibrate_teacache

        pipeline = self.load()
        call = self.call_of(pipeline)
        counts = self.steps or [_own_steps(pipeline)]
        if self.method is Method.TEACACHE:
            signal = self.signal or "modulated"
            fitted = calibrate_teacache(
                pipeline, texts, num_inference_steps=counts, signal=signal, progress=progress, **call
            )
            return fitted, f'TeaCache(0.25, coefficients=Coefficients.load("{self.out.as_posix()}"))'
        if len(counts) != 1:
            raise InvalidConfig(f"a magnitude curve belongs to one step count, got --steps {counts}; give one")
        curve = calibrate_magcache(pipeline, texts, num_inference_steps=counts[0], progress=progress, **call)
        return curve, f'MagCache(0.24, curve=MagnitudeCurve.load("{self.out.as_posix()}"))'

    def load(self) -> DiffusionPipeline:
        """Load the pipeline, quiet and on its device."""
        import torch

        try:
            place = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise InvalidConfig(
                f"--device is a torch device such as cpu or cuda:0, got {self.device!r}: {error}"
            ) from error
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        kind = self.dtype or ("float32" if place.type == "cpu" else "bfloat16")
        if kind not in dtypes:
            raise InvalidConfig(f"--dtype is one of {', '.join(dtypes)}, got {self.dtype!r}")
        pipeline = (
            fastdit.load_mini(torch_dtype=dtypes[kind]) if self.pipe == "mini" else _saved(self.pipe, dtypes[kind])
        )
        try:
            pipeline.to(place)
        except (RuntimeError, AssertionError) as error:
            raise InvalidConfig(f"--device {place} can't be used: {error}; give one that this machine has") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def call_of(self, pipeline: DiffusionPipeline) -> dict[str, object]:
        """Gather the call's arguments that were given, and its noise. Raises where the pipeline does not take one."""
        import torch

        options = {"height": self.height, "width": self.width, "guidance_scale": self.guidance}
        given = {name: value for name, value in options.items() if value is not None}
        parameters = inspect.signature(type(pipeline).__call__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if unknown := [name for name in given if name not in parameters and not takes_any]:
            raise InvalidConfig(f"{type(pipeline).__name__} takes no {' and no '.join(unknown)}; leave it out")
        return {**given, "generator": torch.Generator().manual_seed(self.seed)}


@app.command()
@functools.wraps(Calibration, assigned=("__doc__",), updated=())
def calibrate(**options: object) -> None:
    # Its parameters are the fields of `Calibration`.
    from rich.console import Console

    build: Callable[..., Calibration] = Calibration
    calibration = build(**options)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        with _progress(errors) as progress, warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", fastdit.FastditWarning)
            result, use = calibration.run(progress)
        for remark in remarks:
            errors.print(f"{remark.category.__name__}: {remark.message}")
        result.save(calibration.out)
    except (FastditError, OSError) as error:
        errors.print(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from error
    typer.echo(f"{calibration.out}: {result.provenance}")
    typer.echo(use)


@engines.command("list")
def list_engines(directory: Kept = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the engines that are kept, the last used first."""
    from fastdit.engine.registry import Registry

    registry = Registry(directory)
    entries = registry.entries()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        typer.echo(
            f"{entry.digest[:12]}  {entry.size / 1e6:8.1f} MB  {used}  {entry.key['engine']} {entry.key['piece']}"
        )
    total = sum(entry.size for entry in entries) / 1e6
    typer.echo(f"{len(entries)} engines, {total:.1f} MB in {registry.directory}")


@engines.command()
def clear(directory: Kept = None) -> None:
    """Remove all the engines that are kept. Those that a process is using stay in its memory."""
    from fastdit.engine.registry import Registry

    registry = Registry(directory)
    typer.echo(f"{registry.clear()} engines removed from {registry.directory}")


def read_prompts(pipe: str, file: Path | None) -> list[str]:
    """Read the prompts, one a line; without a file the embedded pipeline takes some that it was trained on."""
    if file is None:
        if pipe != "mini":
            raise InvalidConfig(
                f"{pipe} needs prompts to be calibrated on; give a text file with --prompts, one a line"
            )
        from fastdit.mini.prompts import training

        return training(MINI_PROMPTS, background=True)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidConfig(
            f"--prompts {file} is no UTF-8 text: {error}; save it as UTF-8, one prompt a line"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InvalidConfig(f"--prompts {file} holds no prompt; write one a line")
    return found


def _saved(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline from a directory or the hub."""
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            # Newer releases call it dtype, which the oldest ones that are supported pass over.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InvalidConfig(
            f"{name} can't be loaded as a diffusers pipeline: {error}; give 'mini', a directory with a "
            "model_index.json, or a model's name on the hub"
        ) from error


def _own_steps(pipeline: DiffusionPipeline) -> int:
    """Give the step count that a pipeline's call has by default."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise InvalidConfig(f"{type(pipeline).__name__} has no step count of its own; give --steps")
    return parameter.default


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for every phase of a measurement, on a console that is not the results' own."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show
