"""FLUX.1-dev and Stable Diffusion 3 medium at full size on one GPU: seconds a step, whole runs, peak memory.

Every configuration is prepared once (its engines built), and then they take turns: a whole call each a round, from
noise to decoded picture, by events on the device's stream. Weights are random (`published.py`), so pictures mean
nothing, and a gate would skip all that it may: what is skipped is imposed, by a mask with the share of steps that
TeaCache is published to compute. Rows that should give the plain run's picture are compared with it. Whatever fails,
gives another picture or none, or finds no time left, is a row that says so. The plain run is the untouched pipeline's.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.engine.aot import AOT
from fastdit.engine.compile import Compile
from fastdit.errors import NeverFired
from fastdit.measure.statistics import Interval, ratio_of_medians
from fastdit.record import Stopwatch
from fastdit.schedule.presets import WHOLE_PRESETS
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.stack import Stack
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.step_mask import StepMask
from fastdit.step_cache.gates.taylorseer import TaylorSeer
from fastdit.token_cache.toca import ToCa
from published import MODELS, Published
from saving import save

#: The parts of the time that the models share, and the part of a model's own that may go into preparing.
SHARES = {"flux-dev": 3.0, "sd3-medium": 1.0}
PREPARING = 0.55

NO_GPU = 3

#: Kernels of diffusers' dispatcher; one that is not installed is a row that says so.
KERNELS = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage", "xformers")


#: How far from the plain run's latents a row may be that should give them, relative to their size.
SAME = 0.05


class TimeUp(BaseException):
    """The time for something is over. No `Exception`, which a compiler would take for a failure of its own."""


@dataclass
class Row:
    """What came of one configuration; `seconds` are those of its whole calls, one a round.

    `make` gives its accelerators; it is None for the untouched pipeline, or the one that `rival` makes faster while
    it is entered. A row that is the `same` must give the plain run's latents, and `error_to_plain` is how far it was.
    `step_seconds` are medians over the forwards that ran in whole, one a stage; `equal_steps` is how many plain steps
    take as long as it; `error` says why it was left.
    """

    name: str
    make: Callable[[], list[Accelerator]] | None
    steps: int | None
    rival: Rival | None = None
    same: bool = False
    stack: Any = None
    prepared: float | None = None
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    forwards: int | None = None
    skipped: int | None = None
    speed_up: Interval | None = None
    equal_steps: float | None = None
    peak_bytes: int | None = None
    error_to_plain: float | None = None
    error: str | None = None
    pipeline: Any = None

    def to_json(self) -> dict[str, Any]:
        hidden = {"make", "pipeline", "rival"}
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in hidden}


def rows(model: Published, directory: str) -> list[Row]:
    """List the configurations, the most telling first: what finds no time left is at the end."""
    architecture, engine = model.architecture, Compile(directory=directory)
    steps, preset, share = architecture.steps, architecture.presets[0], model.computed
    fast = next(name for name in ("7x", "6x") if name in architecture.presets)

    def own(name: str, make: Callable[[], list[Accelerator]], *, staged: bool = False, same: bool = False) -> Row:
        return Row(name, make, None if staged else steps, same=same)

    def whole(preset: str) -> ProgressiveResolution:
        return ProgressiveResolution(preset)

    def masked(preset: str | None = None) -> StepMask:
        return imposed(steps if preset is None else sum(WHOLE_PRESETS[preset].steps), share)

    plain = [Row(f"plain, {count} steps", None, count) for count in (steps, steps // 2, steps // 4)]
    return [
        *plain,
        own("Compile", lambda: [engine], same=True),
        Row("compile_repeated_blocks", None, steps, CompiledBlocks(), same=True),
        own(f"ProgressiveResolution {fast}, mask, Compile", lambda: [whole(fast), masked(fast), engine], staged=True),
        own(f"ProgressiveResolution {preset}", lambda: [whole(preset)], staged=True),
        own("mask", lambda: [masked()]),
        own(f"ProgressiveResolution {preset}, mask", lambda: [whole(preset), masked(preset)], staged=True),
        own(f"ProgressiveResolution {preset}, Compile", lambda: [whole(preset), engine], staged=True),
        own("mask, Compile", lambda: [masked(), engine]),
        own("AOT", lambda: [AOT(directory=directory)], same=True),
        own("Compile, CUDA graphs", lambda: [Compile(cuda_graphs=True, directory=directory)], same=True),
        own(f"RALU {preset}", lambda: [RALU(preset)], staged=True),
        own(f"RALU {preset}, Compile", lambda: [RALU(preset), engine], staged=True),
        own("empty stack", lambda: [], same=True),
        Row("max-autotune, CUDA graphs", None, steps, Autotuned(), same=True),
        Row("diffusers FirstBlockCache", None, steps, hooked("FirstBlockCacheConfig")),
        Row("diffusers TaylorSeer", None, steps, hooked("TaylorSeerCacheConfig")),
        own("TaylorSeer", lambda: [TaylorSeer()]),
        own("FirstBlockCache", lambda: [FirstBlockCache(0.1)]),
        own("ToCa", lambda: [ToCa()]),
        *(own(f"attention {name}", lambda name=name: [attention(name)], same=True) for name in KERNELS),
        own("XFormers (adapter)", xformers, same=True),
        own("TensorRT (adapter)", lambda: tensorrt(directory), same=True),
    ]


def imposed(steps: int, share: float) -> StepMask:
    """Give a mask that computes the first step and, spread evenly, so large a share of all."""
    computed = {round(index * steps / round(share * steps)) for index in range(round(share * steps))}
    return StepMask(tuple(step in computed for step in range(steps)))


Rival = Callable[[Any], AbstractContextManager[None]]
"""What another library does to a pipeline, for as long as it is entered."""


class CompiledBlocks:
    """The blocks that diffusers' `compile_repeated_blocks` compiled, in use while entered; kept between."""

    def __init__(self) -> None:
        self._calls: dict[torch.nn.Module, Any] = {}

    @contextmanager
    def __call__(self, pipeline: Any) -> Iterator[None]:
        if not self._calls:
            pipeline.transformer.compile_repeated_blocks()
            modules = pipeline.transformer.modules()
            self._calls = {part: call for part in modules if (call := part._compiled_call_impl) is not None}
        for part, call in self._calls.items():
            part._compiled_call_impl = call
        try:
            yield
        finally:
            for part in self._calls:
                del part._compiled_call_impl  # the class has None


class Autotuned:
    """The whole transformer compiled, its kernels chosen by trial and captured as CUDA graphs, while entered."""

    def __init__(self) -> None:
        self._compiled: Any = None

    @contextmanager
    def __call__(self, pipeline: Any) -> Iterator[None]:
        transformer = pipeline.transformer
        if self._compiled is None:
            self._compiled = torch.compile(transformer, mode="max-autotune")
        pipeline.transformer = self._compiled
        try:
            yield
        finally:
            pipeline.transformer = transformer


def hooked(config: str) -> Rival:
    """Give a rival of diffusers' own caches, at its defaults."""

    @contextmanager
    def entered(pipeline: Any) -> Iterator[None]:
        import diffusers

        pipeline.transformer.enable_cache(getattr(diffusers, config)())
        try:
            yield
        finally:
            pipeline.transformer.disable_cache()

    return entered


def attention(name: str) -> Accelerator:
    from fastdit.attention.dispatcher import Attention

    return Attention(name)


def xformers() -> list[Accelerator]:
    from fastdit_xformers import XFormers

    return [XFormers()]


def tensorrt(directory: str) -> list[Accelerator]:
    from fastdit_tensorrt import TensorRT

    return [TensorRT(directory=directory)]


class Bench:
    """One model on one device: prepares rows and runs them in turns until `deadline`, a value of `time.monotonic`."""

    def __init__(self, model: Published, device: str, dtype: torch.dtype, deadline: float) -> None:
        self.device, self.deadline = torch.device(device), deadline
        self._preparing_ends = time.monotonic() + PREPARING * (deadline - time.monotonic())
        self.pipeline = model.build(device, dtype)
        self._call = model.call(self.pipeline)
        self._plain: torch.Tensor | None = None

    def prepare(self, row: Row) -> None:
        """Make a row's twin, build its engines, and run it so far that nothing is new to the first round.

        A row with a stack may take half of what is left of the time for preparing, and leaves the rest to the others.
        """
        start = time.monotonic()

        def act() -> None:
            row.pipeline = self.pipeline
            if row.make is not None:
                stack = Stack(row.make())
                row.stack, row.pipeline = stack.to_json(), accelerate(self.pipeline, stack)
                if stack.engine is not None:
                    row.pipeline.fastdit.warmup(num_inference_steps=row.steps, progress=False, **self._call)
            self._check(row)
            row.prepared = time.monotonic() - start

        left = self._preparing_ends - start
        self._attempt(row, act, left if row.make is None else left / 2)

    def round(self, rows: Iterable[Row]) -> None:
        """Run every row once."""
        for row in rows:
            self._attempt(row, partial(self._timed, row), self.deadline - time.monotonic())

    def _timed(self, row: Row) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        clock = Stopwatch(self.device)
        self._run(row, row.steps)
        clock.stop()
        row.seconds.append(clock.seconds)
        if self.device.type == "cuda":
            row.peak_bytes = max(row.peak_bytes or 0, torch.cuda.max_memory_allocated())
        if row.make is not None:
            read_record(row, row.pipeline.fastdit.last_run)

    def _run(self, row: Row, steps: int | None, output: str = "pt") -> torch.Tensor:
        count = {} if steps is None else {"num_inference_steps": steps}
        generator = torch.Generator().manual_seed(0)
        with nullcontext() if row.rival is None else row.rival(self.pipeline):
            made: torch.Tensor = row.pipeline(**self._call, **count, output_type=output, generator=generator).images
        return made

    def _check(self, row: Row) -> None:
        """Compare the latents of two steps with the plain run's where they should be the same. Raises if they are not.

        Two steps, since what an engine rounds otherwise grows from step to step as any other rounding does.
        """
        latents = self._run(row, None if row.steps is None else 2, "latent").float()
        if not latents.isfinite().all():
            raise ArithmeticError("its latents are not finite")
        if row.same:
            if self._plain is None:
                self._plain = self._run(Row("plain", None, 2, pipeline=self.pipeline), 2, "latent").float()
            row.error_to_plain = float((latents - self._plain).norm() / self._plain.norm())
            if row.error_to_plain > SAME:
                raise ArithmeticError(f"its latents are {row.error_to_plain:.3f} of their size from the plain run's")

    def _attempt(self, row: Row, act: Callable[[], None], seconds: float) -> None:
        """Do something for a row. What goes wrong is written into the row, which is then left; the others go on."""
        try:
            with limited(seconds):
                act()
            return
        except TimeUp:
            row.error = "left out: the time was up"
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}"
        row.pipeline = None
        release(self.device)


def read_record(row: Row, record: Any) -> None:
    """Take over how many forwards there were, and what those that ran in whole took at each stage."""
    row.forwards, row.skipped = len(record.steps), record.skipped + record.partial
    stages: dict[int, list[float]] = {}
    for step in record.steps:
        if step.action == "computed":
            stages.setdefault(step.stage, []).append(step.seconds)
    row.step_seconds = [median(seconds) for _, seconds in sorted(stages.items())]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in whatever runs inside once the seconds are over, or when it next returns from compiled code."""

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(bench: Bench, rows: list[Row], *, rounds: int, say: Callable[[str], None]) -> None:
    """Prepare all rows and run them in turns, as many whole rounds as there is time for; at most `rounds`."""
    for row in rows:
        bench.prepare(row)
        say(f"{row.name}: {row.error or f'prepared in {row.prepared:.1f} s'}")
    order = random.Random(0)
    for number in range(rounds):
        running = [row for row in rows if row.error is None]
        # The first round is in the rows' order, so that the important ones are run if the time ends in it.
        if number:
            if time.monotonic() + sum(row.seconds[-1] for row in running) > bench.deadline:
                say(f"{number} of {rounds} rounds: the time is up")
                return
            order.shuffle(running)
        bench.round(running)
        say(f"round {number + 1}: {sum(row.error is None for row in rows)} configurations")


def compare(rows: list[Row]) -> None:
    """Set the rows beside the plain runs: speed-ups to the first, and the number of plain steps that take as long."""
    plain = [row for row in rows if row.make is None and row.rival is None and row.seconds and row.error is None]
    baseline = rows[0]
    if baseline not in plain:
        return
    line = np.polyfit([row.steps for row in plain], [median(row.seconds) for row in plain], 1) if plain[1:] else None
    for row in rows:
        if row.error is None and len(row.seconds) == len(baseline.seconds):
            row.speed_up = ratio_of_medians(baseline.seconds, row.seconds)
            if line is not None:
                row.equal_steps = float((median(row.seconds) - line[1]) / line[0])


def table(title: str, rows: list[Row]) -> Table:
    """Show the rows that ran."""
    shown = Table(title=title, title_justify="left")
    headings = ("run", "s/run", "s/step", "speed-up", "as long as plain steps", "skipped", "peak GiB", "prepared s")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        if row.error is None:
            shown.add_row(
                row.name,
                f"{median(row.seconds):.3f}" if row.seconds else "",
                " / ".join(f"{seconds:.4f}" for seconds in row.step_seconds),
                "" if row.speed_up is None else format(row.speed_up, ".2f"),
                "" if row.equal_steps is None else f"{row.equal_steps:.1f}",
                "" if row.forwards is None else f"{row.skipped} of {row.forwards}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
                "" if row.prepared is None else f"{row.prepared:.1f}",
            )
    return shown


def main(
    minutes: Annotated[float, typer.Option(help="For everything; what finds no time left says so in its row.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="At most; as many as there is time for.")] = 5,
    models: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(MODELS),
    only: Annotated[str, typer.Option(help="Only rows whose name has this in it, and the plain runs.")] = "",
    directory: Annotated[Path | None, typer.Option(help="Where engines are kept; a new folder if left out.")] = None,
    out: Path = Path("benchmarks/results/gpu.json"),
    try_on_cpu: Annotated[
        bool, typer.Option(help="Try this script out: tiny models on the CPU, nothing saved as a result.")
    ] = False,
) -> None:
    """Measure everything that is installed; exit 3 where there is no CUDA device, 1 where the plain run failed."""
    if not try_on_cpu and not torch.cuda.is_available():
        print("There is no CUDA device here, and this benchmark is for one; --try-on-cpu tries the script itself out.")
        raise typer.Exit(NO_GPU)
    warnings.simplefilter("ignore", NeverFired)
    end = time.monotonic() + 60.0 * minutes
    names = [name.strip() for name in models.split(",")]
    device = "cpu" if try_on_cpu else "cuda"
    kept = str(directory or tempfile.mkdtemp(prefix="engines-"))
    found: dict[str, Any] = {}
    failed = False
    for index, name in enumerate(names):
        model = MODELS[name].smallest() if try_on_cpu else MODELS[name]
        chosen = [row for row in rows(model, kept) if row.name.startswith("plain") or only in row.name]
        left = sum(SHARES[later] for later in names[index:])
        now = time.monotonic()
        bench = Bench(model, device, torch.bfloat16, now + (end - now) * SHARES[name] / left)
        measure(bench, chosen, rounds=rounds, say=lambda text: print(text, flush=True))
        compare(chosen)
        Console(width=None if Console().is_terminal else 160).print(table(f"{name}, {model.pixels} px", chosen))
        for row in chosen:
            row.pipeline = None  # one model at a time
            if row.error is not None:
                print(f"  {row.name}: {row.error}")
        found[name] = {
            "pixels": model.pixels,
            "text_tokens": model.text_tokens,
            "parameters": sum(parameter.numel() for parameter in bench.pipeline.transformer.parameters()),
            "rows": [row.to_json() for row in chosen],
        }
        failed |= chosen[0].error is not None
        del bench, chosen
        release(torch.device(device))
        if not try_on_cpu:  # after each model: what was measured outlives a process that is killed
            save(out, {"dtype": "bfloat16", "minutes": minutes, "models": found}, device=device)
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
