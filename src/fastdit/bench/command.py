"""`fastdit bench`: measures stacks on a pipeline of one's own, and shows what each gains."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastdit.errors import InvalidConfig
from fastdit.mini.language import language_of

if TYPE_CHECKING:
    from fastdit.bench.experiment import Experiment, Group
    from fastdit.bench.outcome import RowOutcome
    from fastdit.bench.store import Store
    from fastdit.bench.workers import Workers
    from fastdit.measure.charts import Waterfall
    from fastdit.measure.timing import Progress

#: Characters that the table needs to hold every cell on one line.
WIDE = 150

#: Prompts that an embedded pipeline is measured on where none are given.
MINI_PROMPTS = 4


def bench(
    pipe: Annotated[
        str | None,
        typer.Argument(help="mini, mini:sd3, a folder, a hub's name, or an experiment's .toml file."),
    ] = None,
    stack: Annotated[
        list[str] | None, typer.Option(help="A stack, such as 'RALU 4x, TeaCache .25, Compile'; as often as you like.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; as often as you like.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Pixels: 512, or 512x768 for height x width.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Steps of the plain run; the pipeline's own.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the noise.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts a call.")] = 1,
    rounds: Annotated[int | None, typer.Option(help="At least; all prompts with all seeds if left out.")] = None,
    precision: Annotated[str, typer.Option(help="Half the width of a speed-up's interval that is wanted.")] = "2%",
    minutes: Annotated[float, typer.Option(help="How long rounds may go on for, in each group.")] = 8.0,
    peers: Annotated[bool, typer.Option(help="Run diffusers' own caches and cache-dit, too.")] = False,
    attribute: Annotated[bool, typer.Option(help="Run every subset of each stack: each part's worth.")] = False,
    isolate: Annotated[bool, typer.Option(help="Give every row processes of its own.")] = False,
    fidelity: Annotated[
        list[str] | None, typer.Option(help="lpips, dinov2, or either=WHERE its weights are; beside PSNR and SSIM.")
    ] = None,
    floor: Annotated[str | None, typer.Option(help="ssim=.9 rejects what is less like the full run.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files: fp16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.")] = None,
    lora: Annotated[str | None, typer.Option(help="A folder or hub id of a LoRA to load.")] = None,
    offload: Annotated[str | None, typer.Option(help="model or sequential: diffusers' offloading.")] = None,
    out: Annotated[Path, typer.Option(help="Where all is kept; the same again goes on there.")] = Path("fastdit-bench"),
    rerun: Annotated[Path | None, typer.Option(help="Repeat the experiment of this folder, in --out.")] = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster to measure on: auto, HOST:PORT, or local.")] = None,
    samples: Annotated[bool, typer.Option("--parquet", help="Write every sample to samples.parquet, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, and nothing else.")] = False,
) -> None:
    """Measure stacks on a pipeline, beside its full run and the plain run that takes as long."""
    from fastdit.bench.cluster import workers_at
    from fastdit.bench.experiment import Experiment
    from fastdit.bench.grammar import parse_stack
    from fastdit.bench.source import Source
    from fastdit.bench.store import Store, parquet
    from fastdit.bench.toml import read_experiment

    if samples:
        parquet()
    if rerun is not None:
        experiment = Store(rerun).experiment()
    elif pipe is None:
        raise InvalidConfig("name a pipeline, such as mini, or a .toml file; or repeat a folder's by --rerun")
    elif pipe.endswith(".toml"):
        experiment = read_experiment(Path(pipe))
    else:
        source = Source(pipe, variant, cast(Any, dtype), device, lora, cast(Any, offload))
        experiment = Experiment(
            pipelines=(source,),
            stacks={text: parse_stack(text) for text in stack or ()},
            prompts=tuple(_prompts(prompt, prompts, source)),
            seeds=tuple(seed or (0,)),
            sizes=None if size is None else tuple(map(pixels, size)),
            steps=None if steps is None else tuple(steps),
            batch=batch,
            rounds=rounds,
            precision=_share(precision),
            minutes=minutes,
            peers=peers,
            attribute=attribute,
            isolate=isolate,
            fidelity=tuple(fidelity or ()),
            ssim_floor=None if floor is None else _floor(floor),
        )
    with workers_at(ray) as workers:
        run_experiment(experiment, Store(out), as_json, workers)
    if samples:
        Store(out).write_samples()


def run_experiment(experiment: Experiment, store: Store, as_json: bool, workers: Workers | None = None) -> None:
    """Measure, here or by workers, print, and write the results; what is finished when interrupted is shown."""
    from rich.console import Console

    from fastdit.bench.outcome import outcomes, results
    from fastdit.bench.protocol import measure
    from fastdit.bench.quality import fidelity_by
    from fastdit.measure.noise import remarks
    from fastdit.measure.report import write_report
    from fastdit.measure.statistics import CONFIDENCE
    from fastdit.measure.table import rich_table

    console, by = Console(), fidelity_by(experiment.fidelity)
    store.begin(experiment, sys.argv)
    try:
        measure(experiment, store, _progress(Console(stderr=True)), workers)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; this is what was finished, and the same command goes on from here")
    found = {group: outcomes(experiment, group, store) for group in experiment.groups()}
    data = [
        {"group": group.title, "fidelity": by, "rows": [outcome_json(row, experiment) for row in rows]}
        for group, rows in found.items()
    ]
    store.write("results.json", data)
    shown = {
        group: results(experiment, group, store, rows)
        for group, rows in found.items()
        if any(row.rounds for row in rows if not row.row.plain)
    }
    pages = [
        write_report(one, store.directory, f"{group.key}.html", _waterfalls(experiment, group, store))
        for group, one in shown.items()
    ]
    if as_json:
        typer.echo(json.dumps(data))
        return
    for group, rows in found.items():
        if group in shown:
            console.print(rich_table(shown[group], narrow=console.width < WIDE))
            for remark in remarks(shown[group]):
                console.print(remark, highlight=False)
        for line in told(experiment, group, store, rows):
            console.print(line, highlight=False)
    console.print(
        f"Measured on {' and '.join(store.machines())}; brackets hold {CONFIDENCE:.0%} intervals.", highlight=False
    )
    console.print(f"Report: {', '.join(map(str, pages)) or 'none yet'}   All of it: {store.directory}", highlight=False)


def _waterfalls(experiment: Experiment, group: Group, store: Store) -> list[Waterfall]:
    from fastdit.bench.outcome import waterfall

    found = (waterfall(experiment, group, store, name) for name in experiment.stacks if experiment.attribute)
    return [one for one in found if one is not None]


def outcome_json(row: RowOutcome, experiment: Experiment) -> dict[str, Any]:
    """Give a row's outcome as plain data."""
    data = asdict(row) | {"row": row.row.to_json(), "status": row.status(experiment.ssim_floor)}
    made: dict[str, Any] = json.loads(json.dumps(data))
    return made


def told(experiment: Experiment, group: Group, store: Store, rows: Sequence[RowOutcome]) -> list[str]:
    """Say what the table does not: each stack's verdict, what preparing it took, warnings, and its parts' worth."""
    from fastdit.bench.outcome import attribution

    lines = []
    for row in rows:
        if row.row.plain:
            continue
        speed_up = "" if row.speed_up is None or not row.shown else f", {row.speed_up:.2f} times"
        took = f"; prepared in {row.phases['build'] + row.phases['first']:.1f} s" if row.phases else ""
        lines.append(f"{row.row.name}: {row.error or row.status(experiment.ssim_floor) + speed_up + took}")
        lines += [f"  {note}" for note in row.notes]
    if experiment.attribute:
        lines += [line for name in experiment.stacks for line in attribution(experiment, group, store, name)]
    return lines


def _prompts(given: Sequence[str] | None, file: Path | None, source: Any) -> list[str]:
    if file is not None:
        try:
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{file} can't be read: {error}") from error
    if given or source.architecture is None:
        return list(given or ())
    return language_of(source.architecture).held_out(MINI_PROMPTS, 0)


def pixels(text: str) -> tuple[int, int]:
    """Read a size: a number of pixels, or height x width."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise InvalidConfig(f"a size is 512, or 512x768 for height x width, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _share(text: str) -> float:
    found = re.fullmatch(r"(\d*\.?\d+)(%?)", text)
    if not found:
        raise InvalidConfig(f"a precision is 2%, or .02, got {text!r}")
    return float(found[1]) / (100.0 if found[2] else 1.0)


def _floor(text: str) -> float:
    found = re.fullmatch(r"ssim=(\d*\.?\d+)", text)
    if not found:
        raise InvalidConfig(f"a floor is ssim=.9 or so, got {text!r}")
    return float(found[1])


def _progress(console: Any) -> Progress:
    """Say every finished round on a line of its own, which a pipe shows too."""

    def say(title: str, done: int, total: int) -> None:
        console.print(f"{title}: round {done} of {total} or more", highlight=False)

    return say


def compare(
    before: Annotated[Path, typer.Argument(help="The folder of an earlier run.")],
    after: Annotated[Path, typer.Argument(help="The folder of a later run of the same experiment.")],
    time: Annotated[str, typer.Option(help="Changes of time up to this are tolerated.")] = "2%",
    memory: Annotated[str, typer.Option(help="Growth of memory up to this is tolerated.")] = "1%",
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Compare seconds, for a machine that is always as fast.")
    ] = False,
) -> None:
    """Compare two runs of one experiment; ends with 1 where a row became slower or larger, for CI.

    Times are taken over the plain pipeline's of the same round, since a machine is not always as fast.
    """
    from fastdit.bench.compare import changes, lines, remarks
    from fastdit.bench.store import Store

    found = changes(Store(before), Store(after), time=_share(time), memory=_share(memory), absolute=absolute)
    for line in (*lines(found), *remarks(found)):
        typer.echo(line)
    raise typer.Exit(any(change.worse for change in found))


def doctor(
    pipe: Annotated[str, typer.Argument(help="A pipeline, as `bench` takes it.")] = "mini",
    whole: Annotated[bool, typer.Option("--whole", help="Also of each attention kernel that can't, why.")] = False,
) -> None:
    """Say what can work here and on a pipeline, and for whatever can't, why and what mends it."""
    from fastdit.bench.doctor import accelerators, environment
    from fastdit.bench.source import Source

    for finding in environment():
        typer.echo(finding)
    kernels = []
    for finding in accelerators(Source(pipe).load()):
        if finding.works or not finding.what.startswith("Attention("):
            typer.echo(finding)
        else:
            kernels.append(finding)
    if kernels and not whole:
        names = ", ".join(re.sub(r".*'(.*)'.*", r"\1", one.what) for one in kernels)
        typer.echo(
            f"no  {len(kernels)} attention kernels of diffusers: {names} -> fastdit doctor {pipe} --whole says why"
        )
    for finding in kernels if whole else ():
        typer.echo(finding)
