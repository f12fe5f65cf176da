"""Calibration: TeaCache's polynomial and MagCache's curve from a model's own runs, in which every step is computed.

TeaCache: the relative change of a signal (the first block's modulated input) and that of the block stack's output are
recorded from step to step; P is the degree-4 least-squares fit from the one to the other.

MagCache: with r_t = (latents' stream at the end of the blocks) - (at their start) at step t,

    gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)||,    the norm over channels; gamma_0 = 1

It is the mean of the ratios, not the ratio of the means. Both are averaged over prompts.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from fastdit.acceleration import accelerate
from fastdit.config import is_count
from fastdit.errors import FastditWarning, InvalidConfig, UnsupportedModel
from fastdit.measure.timing import Progress, silent
from fastdit.models.signals import SIGNAL_KINDS, signal_for
from fastdit.step_cache.base import Memory, Scope, Site, StepCache, difference
from fastdit.step_cache.coefficients import Coefficients
from fastdit.step_cache.curves import MagnitudeCurve
from fastdit.step_cache.gates.magcache import curve_of
from fastdit.step_cache.published import source_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_DEGREE = 4

#: A fall of P by less than this share of its span is no news.
_FALL = 0.01


@dataclasses.dataclass
class _Changes(Memory):
    """The last step's signal and output, and how far the signal moved since."""

    moved: float | None = None
    end: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Recorder(StepCache):
    """Computes every step and writes down how much signal and output changed."""

    kind: str = "modulated"
    pairs: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def neutral(self) -> bool:
        return True

    def memory(self) -> Memory:
        return _Changes()

    def signal(self, site: Site) -> torch.Tensor | None:
        function = signal_for(site.block, self.kind)
        if function is None:
            raise UnsupportedModel(
                f"{_block_class(site)} has no signal {self.kind!r} ({SIGNAL_KINDS[self.kind]}) described; "
                "calibrate on another signal, or describe it in fastdit.models.signals"
            )
        return function(site.block, site.hidden_states, site.args, site.kwargs)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Changes)
        memory.moved = None if memory.signal is None else _ratio(difference(signal, memory.signal))
        memory.signal = signal

    def learn(self, memory: Memory, site: Site, end: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Changes)
        if memory.moved is not None and memory.end is not None:
            pair = memory.moved, _ratio(difference(end, memory.end))
            if all(map(math.isfinite, pair)):
                self.pairs.append(pair)
        memory.end = end


def _ratio(change: torch.Tensor) -> float:
    amount, scale = change.tolist()
    return amount / scale if scale else math.nan


@dataclasses.dataclass
class _Walk:
    """The latents' stream on its way through the block lists, in one branch of a run, and the ratios so far.

    `entered` is where the current step began, `current` where the stream was last found, alone or as a part of a list's
    tokens, and `last` that, or what the last list gave where it did not take the stream up.
    """

    ratios: list[float] = dataclasses.field(default_factory=list)
    step: int | None = None
    total_steps: int = 0
    entered: torch.Tensor | None = None
    current: torch.Tensor | None = None
    last: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def take(self, step: int, entered: torch.Tensor, end: torch.Tensor) -> None:
        """Take in one block list of a step: what entered it and what it gave."""
        if step != self.step:
            self.step, self.entered, self.current, self.last = step, entered, end, end
            return
        assert self.current is not None
        place = _place_of(self.current, entered)
        if place is None:
            self.last = end
        else:
            self.current = self.last = end[:, place]

    def close(self) -> None:
        """Write down the step that is over."""
        if self.entered is None or self.last is None:
            return
        if self.last.shape != self.entered.shape:
            raise UnsupportedModel(
                f"the latents enter the blocks as {tuple(self.entered.shape)} and leave them within "
                f"{tuple(self.last.shape)}, where they can't be found again, so there is no residual to measure; use a "
                "step cache that needs no magnitude curve, such as FirstBlockCache"
            )
        residual = (self.last - self.entered).float()
        self.ratios.append(1.0 if self.residual is None else _mean_ratio(residual, self.residual))
        self.residual = residual


def _place_of(stream: torch.Tensor, joined: torch.Tensor) -> slice | None:
    """Find the tokens [batch, tokens, ...] of a stream at the start or the end of those of another; None if absent."""
    if stream.dim() != joined.dim() or stream.dim() < 3:
        return None
    tokens, total = stream.shape[1], joined.shape[1]
    places = (slice(0, tokens), slice(total - tokens, total)) if tokens <= total else ()
    return next((place for place in places if torch.equal(joined[:, place], stream)), None)


def _mean_ratio(after: torch.Tensor, before: torch.Tensor) -> float:
    """Mean over tokens of ||after|| / ||before||, both float32 [batch, ..., channels]."""
    return float((after.norm(dim=-1) / before.norm(dim=-1)).mean())


@dataclasses.dataclass(frozen=True)
class _Residuals(StepCache):
    """Computes every step and writes down the ratio of the residual's norm to that of the step before, by branch.

    It looks at every block list by itself, for in some models a later list takes latents and text joined.
    """

    scope: Scope = "list"
    walks: dict[str, list[_Walk]] = dataclasses.field(default_factory=dict)

    @property
    def neutral(self) -> bool:
        return True

    def learn(self, memory: Memory, site: Site, end: torch.Tensor, computed: bool) -> None:
        context = site.context
        if context.skipped_timesteps:
            raise InvalidConfig(
                f"the run starts at timestep {context.skipped_timesteps} of its schedule, and a magnitude curve covers "
                "a whole run; calibrate from noise (a strength of 1)"
            )
        walks = self.walks.setdefault(context.branch, [])
        if not walks or (walks[-1].step or 0) > context.step:
            walks.append(_Walk())  # a loop of its own, such as the next section of a video
        walk = walks[-1]
        if walk.step != context.step:
            walk.close()
        walk.total_steps = context.total_steps
        walk.take(context.step, site.entered, end)

    def finish(self) -> list[tuple[str, list[float]]]:
        """Close the run and give its loops' ratios by branch. Raises `InvalidConfig` where steps were left out."""
        found = []
        for branch, walks in self.walks.items():
            for walk in walks:
                walk.close()
                if len(walk.ratios) != walk.total_steps:
                    raise InvalidConfig(
                        f"branch {branch!r} ran at {len(walk.ratios)} of {walk.total_steps} steps, and a magnitude "
                        "curve has one ratio for each; calibrate with guidance in all steps or in none"
                    )
                found.append((branch, walk.ratios))
        self.walks.clear()
        return found


def calibrate_teacache(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int | Sequence[int] = 28,
    signal: str = "modulated",
    progress: Progress = silent,
    **call: object,
) -> Coefficients:
    """Fit the polynomial for this pipeline on `prompts` (50 or more are advisable) at one or several step counts.

    `signal` is what the changes are taken of, a key of `fastdit.models.signals.SIGNAL_KINDS`; `call` goes to the
    pipeline (height, width, guidance_scale, generator ...). The result carries its range and how it was made; `save`
    writes it as JSON. Raises `InvalidConfig` where the runs gave too few points for a fit, and `UnsupportedModel`
    where the model's blocks don't have the signal. Warns (`FastditWarning`) where P falls inside its range.
    """
    if signal not in SIGNAL_KINDS:
        raise InvalidConfig(f"a signal is one of {', '.join(SIGNAL_KINDS)}, got {signal!r}")
    if signal == "first_block_residual":
        raise UnsupportedModel(
            "what the first block adds is known only after that block, where TeaCache no longer looks, so nothing "
            "could use the fit; use FirstBlockCache, which watches it, or calibrate on another signal"
        )
    counts = [num_inference_steps] if isinstance(num_inference_steps, int) else list(num_inference_steps)
    recorder = _Recorder(kind=signal)
    for _ in _runs(pipeline, recorder, prompts, counts, call, progress):
        pass
    moved, changed = np.array(recorder.pairs, dtype=np.float64).reshape(-1, 2).T
    if len(np.unique(moved)) <= _DEGREE:
        raise InvalidConfig(
            f"{len(moved)} step-to-step changes of the signal, {len(np.unique(moved))} of them different, can't fix a "
            f"polynomial of degree {_DEGREE}; give more prompts or more steps"
        )
    low, high = float(moved.min()), float(moved.max())
    values, _, rank, _, _ = np.polyfit(moved, changed, _DEGREE, full=True)
    if rank <= _DEGREE:
        raise InvalidConfig(
            f"the signal's changes ({low:.4g} to {high:.4g}) are too alike to fix a polynomial of degree {_DEGREE}; "
            "give several step counts, or calibrate on another signal"
        )
    fitted = Coefficients(tuple(float(value) for value in values), (low, high), signal=signal)
    fall = _fall(fitted, low, high)
    steps = counts[0] if len(counts) == 1 else counts
    provenance = (
        f"{_origin(pipeline, prompts, call)} at {steps} steps, {len(moved)} points, R squared "
        f"{_explained(changed, np.polyval(values, moved)):.3f}, changes {low:.4g} to {high:.4g}"
    )
    if fall is not None:
        warnings.warn(
            f"the polynomial falls from {fitted(fall[0]):.4g} to {fitted(fall[1]):.4g} while the change of the signal "
            f"grows from {fall[0]:.4g} to {fall[1]:.4g}, inside its range {low:.4g} to {high:.4g}: there a larger "
            "change counts for less. Calibrate on more prompts or step counts, or use a cache without a polynomial, "
            "such as FirstBlockCache",
            FastditWarning,
            stacklevel=2,
        )
        provenance += f", falls between {fall[0]:.4g} and {fall[1]:.4g}"
    return dataclasses.replace(fitted, provenance=provenance)


def _explained(values: npt.NDArray[np.float64], fitted: npt.NDArray[np.float64]) -> float:
    """R squared of a fit; not a number where there was nothing to explain."""
    spread = float(values.var())
    return 1.0 - float((values - fitted).var()) / spread if spread else math.nan


def _fall(polynomial: Coefficients, low: float, high: float) -> tuple[float, float] | None:
    """Find where P falls deepest inside its range, as (from, to); None where it rises all along, as it should.

    What counts is P as it is used, kept from going negative; a fall below `_FALL` of P's span is left out.
    """
    changes = np.linspace(low, high, 1001)
    values = np.array([polynomial(float(change)) for change in changes])
    depths = np.maximum.accumulate(values) - values
    bottom = int(depths.argmax())
    if depths[bottom] <= _FALL * float(np.ptp(values)):
        return None
    return float(changes[int(values[: bottom + 1].argmax())]), float(changes[bottom])


def calibrate_magcache(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 28,
    progress: Progress = silent,
    **call: object,
) -> MagnitudeCurve:
    """Measure the magnitude curve of this pipeline at one step count, averaged over `prompts` (a few are enough).

    gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)||, r the blocks' residual of the latents' stream. Where the
    pipeline calls its transformer once for each guidance branch, the second one gets a curve of its own; images that
    share a forward are averaged. `call` goes to the pipeline (height, width, guidance_scale, generator ...).

    Raises `InvalidConfig` for anything but one step count (a run of another takes the nearest entries) or where a
    ratio is not finite, and `UnsupportedModel` where the latents can't be followed through the blocks.
    """
    if not is_count(num_inference_steps, 2):
        raise InvalidConfig(
            f"a magnitude curve belongs to one step count of at least 2, got {num_inference_steps!r}; runs of other "
            "lengths take its nearest entries"
        )
    recorder = _Residuals()
    rows: tuple[list[list[float]], list[list[float]]] = ([], [])
    left_out: set[str] = set()
    for _ in _runs(pipeline, recorder, prompts, [num_inference_steps], call, progress):
        for branch, ratios in recorder.finish():
            number = curve_of(branch)
            if number is None:
                left_out.add(branch)
            else:
                rows[number].append(ratios)
    lengths = {len(ratios) for found in rows for ratios in found}
    if len(lengths) != 1:
        raise InvalidConfig(
            f"a magnitude curve is of one length and of branches of guidance, and the pipeline's loops took "
            f"{', '.join(map(str, sorted(lengths))) or 'no'} steps in such (others: {', '.join(left_out) or 'none'}); "
            "use a step cache that needs no magnitude curve, such as FirstBlockCache"
        )
    curves = [_checked(np.array(found), prompts) for found in rows if found]
    parts = [f"{_origin(pipeline, prompts, call)} at {num_inference_steps} steps"]
    for name, curve in zip(("", "second branch: "), curves, strict=False):
        mean, deviation = curve.mean(axis=0), curve.std(axis=0)
        worst = int(deviation.argmax())
        parts.append(
            f"{name}ratios {mean[1:].min():.4g} to {mean[1:].max():.4g}, standard deviation over prompts "
            f"{deviation[1:].mean():.2g} in the mean and at most {deviation[worst]:.2g} (step {worst}, from 0)"
        )
    if left_out:
        parts.append(f"without {', '.join(sorted(left_out))}")
    first, *others = (tuple(float(value) for value in curve.mean(axis=0)) for curve in curves)
    return MagnitudeCurve(first, others[0] if others else None, "; ".join(parts))


def _checked(curves: npt.NDArray[np.float64], prompts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Give the runs' ratios [runs, steps] back. Raises `InvalidConfig` where one is not a finite number above 0."""
    bad = np.argwhere(~(np.isfinite(curves) & (curves > 0.0)))
    if len(bad):
        run, step = (int(place) for place in bad[0])
        prompt = prompts[run * len(prompts) // len(curves)]
        raise InvalidConfig(
            f"the residual's norm grew by a factor of {curves[run, step]} at step {step} of the run of {prompt!r}; "
            "look for NaN or inf in the latents or in the weights, or for blocks that add nothing"
        )
    return curves


def _runs(
    pipeline: DiffusionPipeline,
    recorder: StepCache,
    prompts: Sequence[str],
    counts: Sequence[int],
    call: Mapping[str, object],
    progress: Progress,
) -> Iterator[None]:
    """Call the pipeline under a recorder for every step count and prompt, and stop after each call."""
    if isinstance(prompts, str) or not prompts:
        raise InvalidConfig(f"calibration takes a list of prompts, at least one, got {prompts!r}")
    if not counts or not all(is_count(count, 1) for count in counts):
        raise InvalidConfig(f"calibration takes one or more step counts of at least 1, got {counts!r}")
    twin = accelerate(pipeline, [recorder])
    jobs = [(count, prompt) for count in counts for prompt in prompts]
    for done, (count, prompt) in enumerate(jobs):
        progress("calibrating", done, len(jobs))
        twin(prompt=prompt, num_inference_steps=count, **{"output_type": "latent", **call})
        yield
    progress("calibrating", len(jobs), len(jobs))


def _origin(pipeline: DiffusionPipeline, prompts: Sequence[str], call: Mapping[str, object]) -> str:
    """Say what was run: the pipeline, the model it was loaded as, what it was called with, and on how many prompts."""
    source = source_of(getattr(pipeline, "transformer", None))
    options = [f"{name}={value}" for name, value in call.items() if isinstance(value, (bool, int, float))]
    model = f"{type(pipeline).__name__}{f' ({source})' if source else ''}{''.join(f', {option}' for option in options)}"
    return f"calibrated on {model}: {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}"


def _block_class(site: Site) -> str:
    return "the whole forward" if site.block is None else type(site.block.original).__name__
