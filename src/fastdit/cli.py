"""The `fastdit` command. Torch is imported inside the commands, so that help and version answer at once.

What goes wrong on purpose is said in one line, by whatever command; the exit status is then 2, and 130 after an
interrupt (Ctrl-C).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import fastdit
from fastdit.bench.command import bench, compare, doctor
from fastdit.bench.plan_command import plan
from fastdit.bench.source import EMBEDDED
from fastdit.bench.tune_command import tune
from fastdit.errors import FastditError, InvalidConfig
from fastdit.mini.language import language_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from rich.console import Console
    from rich.progress import TaskID

    from fastdit.engine.registry import Registry
    from fastdit.measure.timing import Progress
    from fastdit.step_cache.coefficients import Coefficients
    from fastdit.step_cache.curves import MagnitudeCurve

#: Characters that the table needs to hold every cell on one line.
WIDE = 150

PIXELS = "Pixels; the pipeline's own if left out."

#: Seconds between two words of progress where there is no terminal.
EVERY_SECONDS = 10

#: Prompts that the embedded pipeline is calibrated on by default.
MINI_PROMPTS = 16


class Method(str, enum.Enum):
    """What can be calibrated."""

    TEACACHE = "teacache"
    MAGCACHE = "magcache"


class Commands(TyperGroup):
    """The commands, and the one place where their errors are said."""

    def invoke(self, context: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise
        except (FastditError, OSError) as error:
            said, status = f"{type(error).__name__}: {error}", 2
        except KeyboardInterrupt:
            said, status = "Interrupted; nothing of this command's work is kept.", 130
        typer.echo(" ".join(said.split()), err=True)
        raise typer.Exit(status)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False)
engines = typer.Typer(no_args_is_help=True, help="List or remove the engines that are kept on disk.")
app.add_typer(engines, name="engines")
app.command()(bench)
app.command()(compare)
app.command()(doctor)
app.command()(plan)
app.command()(tune)
Kept = Annotated[Path | None, typer.Option("--directory", help="Where they are kept; fastdit's own cache if left out.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(fastdit.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Accelerators for diffusers pipelines that compose, and an honest bench for them."""
    # Transformers remarks on optional packages at import, which a command's output is no place for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where pictures, results.json and report.html go.")] = Path(
        "fastdit-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts: about a minute, wider intervals.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the prompts and the noise.")] = 0,
) -> None:
    """Make pictures with the embedded pipeline, plain and accelerated, and report speed and quality.

    Results are written after every round: Ctrl-C ends the demo with those that are there.
    """
    from rich.console import Console

    try:
        from fastdit.measure.demo import EXTENTS, REPORT, RESULTS, run_demo
        from fastdit.measure.noise import remarks
        from fastdit.measure.statistics import CONFIDENCE
        from fastdit.measure.table import rich_table
    except ModuleNotFoundError as error:
        raise InvalidConfig(f"the demo needs {error.name}: pip install 'fastdit[demo]'") from error

    out.mkdir(parents=True, exist_ok=True)
    with _progress(Console(stderr=True)) as progress:
        results = run_demo(out, extent=EXTENTS["quick" if quick else "full"], seed=seed, progress=progress)
    interrupted, shortened, left_out = map(results.settings.get, ("interrupted", "shortened", "left_out"))
    if as_json:
        typer.echo(results.dumps())
    else:
        console = Console()
        console.print(rich_table(results, narrow=console.width < WIDE))
        if console.width < WIDE:
            console.print(f"The report has more columns, and so has a terminal of {WIDE} characters.")
        for remark in remarks(results):
            console.print(remark)
        console.print(
            f"Measured on {results.environment}; {len(results.prompts)} prompts, brackets hold {CONFIDENCE:.0%} "
            "intervals."
        )
        console.print(f"Report: {out / REPORT}   Numbers: {out / RESULTS}")
    if left_out:
        typer.echo(f"Left out: {left_out}", err=True)
    if shortened:
        typer.echo(f"Ended {shortened}, to keep to the demo's time on this machine.", err=True)
    if interrupted:
        typer.echo(f"Interrupted {interrupted}; what was measured until then is kept in {out}.", err=True)
        raise typer.Exit(130)


def support(only: str, as_json: bool) -> None:
    """Run tiny models of the installed diffusers' pipelines, and print what works with which."""
    from rich.console import Console

    from fastdit.measure.support import pipeline_classes, supported, table

    asked = [pipeline for pipeline in pipeline_classes() if only.lower() in pipeline.__name__.lower()]
    if not asked:
        raise InvalidConfig(f"no pipeline of the installed diffusers has {only!r} in its name; give a part of one")
    rows = []
    try:
        with _progress(Console(stderr=True)) as progress:
            for done, pipeline in enumerate(asked, start=1):
                rows.append(supported(pipeline))
                progress("running tiny models", done, len(asked))
    except KeyboardInterrupt:
        if not rows:
            raise
        typer.echo(f"Interrupted after {len(rows)} of {len(asked)} pipelines.", err=True)
    typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else table(rows))
    if len(rows) < len(asked):
        raise typer.Exit(130)


@app.command()
def matrix(
    pipe: Annotated[
        str,
        typer.Argument(
            help="mini, mini:sd3, a folder, a hub's name: what goes together on it. Else a part of "
            "the names of diffusers' pipelines, of which tiny models are run; all if left out."
        ),
    ] = "",
    part: Annotated[
        list[str] | None, typer.Option(help="An accelerator as text, as often as you like; all that work if left out.")
    ] = None,
    level: Annotated[list[str] | None, typer.Option(help="Only those of a level, such as attention.")] = None,
    triples: Annotated[bool, typer.Option("--triples", help="Three at a time, too.")] = False,
    size: Annotated[str | None, typer.Option(help="Pixels: 512, or 512x768 for height x width.")] = None,
    steps: Annotated[int, typer.Option(help="Of stacks whose schedule takes as many.")] = 8,
    rounds: Annotated[int, typer.Option(min=3, help="In turns with the plain pipeline.")] = 3,
    prompt: Annotated[str, typer.Option(help="What every cell makes.")] = "a cat",
    out: Annotated[Path, typer.Option(help="Cells and tables; the same again goes on.")] = Path("fastdit-matrix"),
    ray: Annotated[str | None, typer.Option(help="A Ray cluster to run on: auto, HOST:PORT, or local.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON, and nothing else.")] = False,
) -> None:
    """Run accelerators together on a pipeline, and say of each cell what came of it and what it gains."""
    from fastdit.bench.matrix_command import compatibility, is_pipeline

    if not is_pipeline(pipe):
        support(pipe, as_json)
        return
    from rich.console import Console

    with _progress(Console(stderr=True)) as progress:
        made = compatibility(pipe, part or (), level or (), (triples, size, steps, rounds, prompt, out, ray), progress)
    typer.echo(json.dumps(made.to_json()) if as_json else made.markdown())
    raise typer.Exit(int(not all(cell.sound for cell in made.cells.values())))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measure what TeaCache or MagCache must know of a model, in runs that skip nothing."""

    pipe: Annotated[str, typer.Argument(help="mini, mini:sd3, or a directory or hub name to load.")]
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
        architecture = EMBEDDED.get(self.pipe)
        pipeline: DiffusionPipeline = (
            _saved(self.pipe, dtypes[kind])
            if architecture is None
            else fastdit.load_mini(architecture, torch_dtype=dtypes[kind])
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

        from fastdit.nested import call_signature

        options = {"height": self.height, "width": self.width, "guidance_scale": self.guidance}
        given = {name: value for name, value in options.items() if value is not None}
        parameters = call_signature(type(pipeline)).parameters
        if unknown := [name for name in given if name not in parameters]:
            raise InvalidConfig(f"{type(pipeline).__name__} takes no {' and no '.join(unknown)}; leave it out")
        return {**given, "generator": torch.Generator().manual_seed(self.seed)}


@app.command()
@functools.wraps(Calibration, assigned=("__doc__",), updated=())
def calibrate(**options: object) -> None:
    # Its parameters are the fields of `Calibration`.
    from rich.console import Console

    build: Callable[..., Calibration] = Calibration
    calibration = build(**options)
    with _progress(Console(stderr=True)) as progress, warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", fastdit.FastditWarning)
        result, use = calibration.run(progress)
    for remark in remarks:
        typer.echo(f"{remark.category.__name__}: {remark.message}", err=True)
    result.save(calibration.out)
    typer.echo(f"{calibration.out}: {result.provenance}")
    typer.echo(use)


@engines.command("list")
def list_engines(directory: Kept = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the engines that are kept, the last used first."""
    registry = _registry(directory)
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
    registry = _registry(directory)
    typer.echo(f"{registry.clear()} engines removed from {registry.directory}")


def _registry(directory: Path | None) -> Registry:
    from fastdit.engine.registry import Registry

    if directory is not None and not directory.is_dir():
        raise InvalidConfig(f"--directory {directory} is no directory; leave it out for fastdit's own cache")
    return Registry(directory)


def read_prompts(pipe: str, file: Path | None) -> list[str]:
    """Read the prompts, one a line; without a file an embedded pipeline takes some that it was trained on."""
    if file is None:
        if pipe not in EMBEDDED:
            raise InvalidConfig(
                f"{pipe} needs prompts to be calibrated on; give a text file with --prompts, one a line"
            )
        return language_of(EMBEDDED[pipe]).training(MINI_PROMPTS, background=True)
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
    from fastdit.nested import call_signature

    parameter = call_signature(type(pipeline)).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise InvalidConfig(f"{type(pipeline).__name__} has no step count of its own; give --steps")
    return parameter.default


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for every phase, on a console that is not the results' own; lines of text where it is no terminal."""
    if not console.is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    left = TimeRemainingColumn(compact=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


def _lines() -> Progress:
    """Say on stderr how far a phase is: at its first word, at its end, and every ten seconds between them."""
    began: dict[str, float] = {}
    said, ended = 0.0, ""

    def show(phase: str, done: int, total: int) -> None:
        nonlocal said, ended
        now = time.monotonic()
        if phase in began and (phase == ended or (done < total and now - said < EVERY_SECONDS)):
            return
        start = began.setdefault(phase, now)
        left = f", about {(now - start) / done * (total - done):.0f} s left" if 0 < done < total and now > start else ""
        typer.echo(f"{phase} {done}/{total}{left}", err=True)
        said, ended = now, phase if done >= total else ""

    return show
