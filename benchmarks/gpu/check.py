"""Say within minutes whether everything runs on this card: what it can do at best, a plain step at full size, and then
every accelerator on the embedded pipelines, with a generator on the device, as most users pass it.

Each must give finite latents, the same ones twice, and engines and kernels the plain run's. Beside that stands how
often a run waits for the device, as torch itself counts it. Every line is printed and written as soon as it is known.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from fastdit import (
    AOT,
    DMD,
    RALU,
    BottleneckSampling,
    ClusCa,
    Compile,
    EasyCache,
    FirstBlockCache,
    FoCa,
    Interval,
    JustInTime,
    LatentLift,
    MagCache,
    PixelLift,
    ProgressiveResolution,
    SeaCache,
    Taylor,
    TeaCache,
    TextAttention,
    ToCa,
    VelocityVariance,
    accelerate,
)
from fastdit.accelerator import Accelerator
from fastdit.engine.base import Engine
from fastdit.errors import FastditWarning
from fastdit.measure.environment import Environment
from fastdit.measure.timing import wait_for
from fastdit.mini import load_mini
from gpu.bench import SAME, SHARE, TimeUp, limited, release
from gpu.rows import KERNELS, attention
from gpu.session import Directory, Minutes, Out, Rehearse, Skip, place, say
from published import MODELS
from saving import write

PROMPT = "an apple on a blue background"

#: How errors begin that say that something is not to be had here, or was not tried.
MISSING = ("UnsupportedModel", "ModuleNotFoundError", "left out")


@dataclasses.dataclass
class Finding:
    """What came of one thing that was tried; `error` is None where it is well."""

    name: str
    seconds: float = 0.0
    waits: int | None = None
    steps: int | None = None
    error_to_plain: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        """In a line."""
        how = "ok" if self.error is None else "FAIL" if self.failed else "none"
        waits = "" if self.waits is None else f", {self.waits} waits in {self.steps} steps"
        error = "" if self.error_to_plain is None else f", {self.error_to_plain:.1e} from plain"
        return f"{how:4} {self.name}: {self.error or f'{self.seconds:.2f} s'}{waits}{error}"

    @property
    def failed(self) -> bool:
        """Whether it was tried and is wrong, rather than not to be had here, or without time."""
        return self.error is not None and not self.error.startswith(MISSING)


def stacks(architecture: str, directory: str) -> dict[str, tuple[list[Accelerator], bool]]:
    """Every accelerator by name for a pipeline, and whether it must give the plain run's picture."""
    flux = architecture == "flux"
    preset = "4x" if flux else "2x"
    gate = TeaCache if flux else FirstBlockCache  # nothing is published of SD3 that TeaCache or MagCache could take
    found: dict[str, tuple[list[Accelerator], bool]] = {"empty stack": ([], True)}
    for made in (
        [RALU.paper(preset)],
        [gate(0.25)],
        [Compile(directory=directory)],
        [RALU(preset), gate(0.25), Compile(directory=directory)],
        [Compile(cuda_graphs=True, directory=directory)],
        [AOT(directory=directory)],
        [RALU(preset)],
        [RALU(preset, lift=PixelLift(noise="hadamard"))],
        [RALU(preset, lift=LatentLift())],
        [RALU.paper(preset, selector=VelocityVariance())],
        [RALU.paper(preset, selector=TextAttention())],
        [RALU.paper(preset, frame="fine")],
        [RALU.paper(preset), gate(0.25, stage_change="carry")],
        [ProgressiveResolution()],
        [BottleneckSampling()],
        [JustInTime()],
        [gate(0.15, per_image=True)],
        [FirstBlockCache(0.2)],
        [FirstBlockCache(0.3, scope="list")],
        [EasyCache(0.3)],
        [SeaCache(0.3)],
        *([[MagCache(0.1)]] if flux else []),
        [Interval(3, forecast=Taylor(2))],
        [Interval(3, forecast=DMD())],
        [Interval(3, forecast=FoCa())],
        [ToCa()],
        [ToCa(score="text")],
        [ClusCa()],
        *(attention(name) for name in KERNELS),
    ):
        exact = all(one.level.name in ("ENGINE", "ATTENTION") for one in made)
        found[", ".join(described(one) for one in made)] = made, exact
    return found


def described(one: Accelerator) -> str:
    """Name an accelerator, without the folder that its engines are kept in."""
    return (dataclasses.replace(one, directory=None) if isinstance(one, Engine) else one).describe()


class Check:
    """Tries things one after another until the time is up, and writes what came of each."""

    def __init__(self, device: str, path: Path, minutes: float, *, rehearsal: bool) -> None:
        self.device, self.path = torch.device(device), path
        self.findings: list[Finding] = []
        self._deadline = time.monotonic() + 60.0 * minutes
        self._data: dict[str, Any] = {"environment": Environment.capture(device), "rehearsal": rehearsal}
        say(str(self._data["environment"]))

    def tell(self, **values: Any) -> None:
        """Print values and keep them."""
        self._data |= values
        for name, value in values.items():
            say(f"{name}: {value}")
        self._write()

    def attempt(self, finding: Finding, act: Callable[[Finding], None], most: float = 90.0) -> None:
        """Try something, for a share of the time left. What goes wrong is a finding; the others go on."""
        start = time.monotonic()
        most = min(most, max(SHARE * (self._deadline - start), 0.0))
        try:
            with limited(most):
                act(finding)
        except TimeUp:
            finding.error = f"left out: it had {most:.0f} s"
        except Exception as error:
            finding.error = f"{type(error).__name__}: {error}"
        finding.seconds = finding.seconds or time.monotonic() - start
        self.findings.append(finding)
        say(str(finding))
        self._write()

    def _write(self) -> None:
        write(self.path, {**self._data, "findings": self.findings})

    def ceilings(self) -> None:
        """Tell what the card does at best: products of matrices in bfloat16, and copies within its memory."""
        size, count = (8192, 10) if self.device.type == "cuda" else (256, 2)
        first, second = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = self._seconds(lambda: first @ second, count)
        source = torch.empty(64 * size * size, dtype=torch.uint8, device=self.device)
        copied = self._seconds(source.clone, count)
        self.tell(matmul_tflops=2 * size**3 / seconds / 1e12, copy_tb_per_second=2 * source.numel() / copied / 1e12)

    def _seconds(self, act: Callable[[], object], count: int) -> float:
        found = []
        for _ in range(count + 3):
            wait_for(self.device)
            start = time.perf_counter()
            act()
            wait_for(self.device)
            found.append(time.perf_counter() - start)
        return median(found[3:])

    def whole(self, name: str, *, tiny: bool) -> None:
        """Time plain steps of a model at full size, whose weights are random."""
        model = MODELS[name].smallest() if tiny else MODELS[name]
        pipeline = model.build(str(self.device), torch.bfloat16)
        times: list[float] = []

        def note(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            wait_for(self.device)
            times.append(time.perf_counter())
            return kwargs

        call = model.call(pipeline) | {"num_inference_steps": 8, "callback_on_step_end": note}
        pipeline(**call, output_type="latent", generator=torch.Generator(self.device).manual_seed(0))
        each = median(later - earlier for earlier, later in itertools.pairwise(times))
        self.tell(**{f"{name}_plain_step_seconds": each, f"{name}_published": dict(model.step_seconds)})

    def pipeline(self, architecture: str, directory: str, steps: int, skip: list[str]) -> None:
        """Try every accelerator on an embedded pipeline."""
        pipeline: Any = load_mini("sd3" if architecture == "sd3" else "flux").to(self.device)
        pipeline.set_progress_bar_config(disable=True)

        def generate(which: Any, steps: int | None) -> torch.Tensor:
            count = {} if steps is None else {"num_inference_steps": steps}
            generator = torch.Generator(self.device).manual_seed(0)
            made: torch.Tensor = which(PROMPT, output_type="latent", generator=generator, **count).images
            return made.float()

        plain = generate(pipeline, steps)
        for name, (stack, exact) in stacks(architecture, directory).items():
            if name in skip:
                continue

            def act(finding: Finding, stack: Any = stack, exact: bool = exact) -> None:
                fast = accelerate(pipeline, stack)
                count = None if any(one.level.name == "SCHEDULE" for one in stack) else steps
                first = generate(fast, count)
                start = time.monotonic()
                with counted_waits(self.device) as waits:
                    second = generate(fast, count)
                finding.seconds = time.monotonic() - start
                finding.waits, finding.steps = waits[0], len(fast.fastdit.last_run.steps)
                if not first.isfinite().all():
                    raise ArithmeticError("its latents are not finite")
                if not torch.equal(first, second):
                    raise ArithmeticError(f"a second call differs by {float((first - second).abs().max()):.1e}")
                if exact:
                    finding.error_to_plain = float((first - plain).norm() / plain.norm())
                    if finding.error_to_plain > SAME:
                        raise ArithmeticError("its latents are not the plain run's")

            self.attempt(Finding(f"{architecture}: {name}"), act)
        release(self.device)


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[int | None]]:
    """Count how often the host waits for the device, by torch's own count; None on a CPU."""
    found: list[int | None] = [None]
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found[0] = sum("synchronizing CUDA operation" in str(one.message) for one in said)


def main(
    minutes: Minutes = 4.0,
    skip: Skip = None,
    only: str = typer.Option("flux,sd3", help="The embedded pipelines to try, with commas between."),
    directory: Directory = None,
    out: Out = None,
    rehearse: Rehearse = False,
) -> None:
    """Try everything; exit 3 without a CUDA device, 1 where something failed that is not merely missing."""
    device, path = place("gpu-check.json", out, rehearse=rehearse)
    warnings.simplefilter("ignore", FastditWarning)
    kept = str(directory or tempfile.mkdtemp(prefix="engines-"))
    check = Check(device, path, minutes, rehearsal=rehearse)
    check.attempt(Finding("ceilings"), lambda _: check.ceilings())
    check.attempt(Finding("flux-dev at full size"), lambda _: check.whole("flux-dev", tiny=rehearse))
    release(torch.device(device))
    for architecture in only.split(","):
        check.pipeline(architecture, kept, 12, skip or [])
    well, failed = (sum(kind) for kind in zip(*((not x.error, x.failed) for x in check.findings), strict=True))
    others = len(check.findings) - well - failed
    say(f"{well} well, {failed} failed, {others} not to be had or left out; written to {path}")
    raise typer.Exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
