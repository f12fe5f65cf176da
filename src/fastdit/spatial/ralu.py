"""RALU: half-resolution first, then edge regions at full resolution, then everything (arXiv 2507.08422).

The stages share one run: the first on a quarter of the tokens, the last on all; between them, where there are three,
one with the most edge-rich coarse tokens split in four. At each switch a *lift* brings the tokens to the next stage and
to an earlier time, so that they follow the flow's own marginal there, and NT-matching spaces the timesteps.

`RALU.paper("4x")` is the paper's recipe. The presets differ from it where that was measured to be better: they lift the
clean estimate through pixels instead of copying noisy tokens, so that the last stage may keep what the first composed
instead of drawing it anew, with one field of noise for the whole run, and they have no mixed stage. Beside it,
fidelity="exact" (the default) mends three flaws of the published code: tokens that are not copied get the right
variance, edges in dark areas are seen, and ties go to raster order instead of to noise. Under both, noise comes from
the user's generator, fresh for each call and image, and every image of a batch has its own selection.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch

from fastdit.accelerator import (
    Break,
    Change,
    Need,
    Schedule,
    SchedulePlan,
    ScheduleRun,
    StagePlan,
    is_count,
    is_number,
    register,
)
from fastdit.errors import InvalidConfig
from fastdit.layout import FRAMES, TokenLayout, gather_tokens
from fastdit.models.family import Family, family_of

from . import edges, matching
from .lift import Lift, PixelLift, Switch, pooled
from .token_copy import TokenCopy

_FLUX, _SD3 = "FLUX.1", "Stable Diffusion 3"


@dataclasses.dataclass(frozen=True)
class _Recipe:
    steps: tuple[int, ...]
    ends: tuple[float, ...]
    ratio: float | None = None
    starts: tuple[float, ...] | None = None
    lift: Lift = dataclasses.field(default_factory=TokenCopy)
    family: str | None = dataclasses.field(default=None, compare=False)


#: The settings by how many times fewer FLOPs they cost than 50 steps (28 of SD3), each for its family of models.
PRESETS = {
    "4x": _Recipe((15, 8), (0.50,), None, (0.15,), PixelLift(), _FLUX),
    "5x": _Recipe((13, 6), (0.50,), None, (0.15,), PixelLift(), _FLUX),
    "7x": _Recipe((10, 4), (0.50,), None, (0.15,), PixelLift(), _FLUX),
    "2x": _Recipe((14, 9), (0.50,), None, (0.15,), PixelLift(), _SD3),
    "3x": _Recipe((10, 6), (0.50,), None, (0.15,), PixelLift(), _SD3),
}

#: The published settings.
PAPER = {
    "4x": _Recipe((5, 6, 7), (0.30, 0.45), 0.3, family=_FLUX),
    "5x": _Recipe((4, 5, 6), (0.30, 0.45), 0.2, family=_FLUX),
    "7x": _Recipe((2, 3, 5), (0.20, 0.30), 0.1, family=_FLUX),
    "2x": _Recipe((5, 6, 9), (0.20, 0.30), 0.3, family=_SD3),
    "3x": _Recipe((3, 3, 6), (0.25, 0.30), 0.2, family=_SD3),
}


@register
@dataclasses.dataclass(frozen=True)
class RALU(Schedule):
    """Region-adaptive latent upsampling in two or three stages.

    `preset` names a setting of the model's family ("4x", the default, "5x" and "7x" of FLUX.1, "2x" and "3x" of SD3).
    What is given beside it takes the place of the preset's; without a preset, `steps` and `ends` are needed:

    - `steps`: how many a stage, two (coarse, fine) or three (coarse, mixed, fine) of them.
    - `ends`: the times at which all stages but the last end (0 = noise, 1 = data).
    - `ratio`: the share of coarse tokens that a mixed stage refines; needed where there is one.
    - `starts`: the times at which all stages but the first start. Left out, they are s = e / (Z (1 - e) + e) of the
      times before them, with one Z that `restart` fixes (at least 2; larger restarts closer to noise) and that the
      matching solves otherwise.
    - `lift`: what happens at a switch: `TokenCopy()` (the paper's; without a preset the default), `PixelLift()` or
      `LatentLift(resize=...)`.

    `base_shift` is the timestep shift that the model was trained for (3 for both families). `frame` says where coarse
    and mixed stages place their tokens: in the "coarse" frame, as if the picture were half as large, with children
    between the coarse tokens (published for FLUX, and what the model sees at half the size), or in the "fine" frame,
    with children at their final places and coarse tokens in the middle of their four cells.

    Raises `InvalidConfig` for an unknown preset and for values out of range.
    """

    preset: str | None = None
    _: dataclasses.KW_ONLY
    steps: tuple[int, ...] | None = None
    ends: tuple[float, ...] | None = None
    ratio: float | None = None
    starts: tuple[float, ...] | None = None
    restart: float | None = None
    lift: Lift | None = None
    base_shift: float = 3.0
    fidelity: str = "exact"
    frame: str = "coarse"

    changes: ClassVar = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar = frozenset({Need.TOKEN_POSITIONS, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    def __post_init__(self) -> None:
        for name in ("steps", "ends", "starts"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(_plain(item) for item in value))
        if self.preset is None and all(value is None for value in (self.steps, self.ends, self.ratio, self.starts)):
            object.__setattr__(self, "preset", "4x")
        if self.preset is not None and self.preset not in PRESETS:
            raise InvalidConfig(f"RALU has no preset {self.preset!r}; choose one of {_listed(PRESETS)}")
        if self.preset is None and (self.steps is None or self.ends is None):
            raise InvalidConfig(
                "RALU without a preset needs steps=(a, b) and ends=(e,), or three steps, two ends and ratio"
            )
        if not isinstance(self.lift, Lift | None):
            raise InvalidConfig(f"lift is a lift such as PixelLift() or TokenCopy(), got {self.lift!r}")
        _validate(self.settings, self.restart, self.base_shift, self.fidelity)
        if self.frame not in FRAMES:
            raise InvalidConfig(f'frame is "coarse" or "fine", got {self.frame!r}')

    @classmethod
    def paper(cls, preset: str = "4x", *, fidelity: str = "paper", **settings: Any) -> RALU:
        """Give the paper's recipe of a preset; fidelity="exact" mends the flaws of its code, `settings` change it."""
        if preset not in PAPER:
            raise InvalidConfig(f"the paper has no preset {preset!r}; choose one of {_listed(PAPER)}")
        recipe = PAPER[preset]
        published = {"steps": recipe.steps, "ends": recipe.ends, "ratio": recipe.ratio}
        return cls(fidelity=fidelity, **{**published, **settings})

    @property
    def settings(self) -> _Recipe:
        """The recipe in force."""
        names = ("steps", "ends", "ratio", "starts", "lift")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.preset is None:
            return _Recipe(**own)
        if self.restart is not None:
            own["starts"] = None
        return dataclasses.replace(PRESETS[self.preset], **own)

    def check(self, pipeline: Any, transformer: Any) -> None:
        """Raise `InvalidConfig` for a preset of another family of models."""
        family = family_of(pipeline)
        if family is None or self.preset is None or PRESETS[self.preset].family == family.name:
            return
        own = ", ".join(name for name, preset in PRESETS.items() if preset.family == family.name) or "none"
        raise InvalidConfig(
            f"RALU's preset {self.preset!r} is for {PRESETS[self.preset].family}, and {type(pipeline).__name__} is "
            f"{family.name}, whose presets are: {own}; choose one of them, or give steps and ends"
        )

    def refined_count(self, rows: int, columns: int) -> int:
        """How many coarse tokens of a `rows` x `columns` fine grid are split in the mixed stage."""
        return int((self.settings.ratio or 0.0) * (rows * columns // 4))

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages. Raises `InvalidConfig` for sizes that don't halve and for too few steps."""
        if rows % 2 or columns % 2:
            raise InvalidConfig(
                f"RALU halves the token grid, and {rows} x {columns} tokens can't be halved; choose a size whose "
                f"grid is even, {rows + rows % 2} x {columns + columns % 2} or {rows - rows % 2} x "
                f"{columns - columns % 2} tokens"
            )
        settings = self.settings
        notes = []
        steps: tuple[int, ...] = settings.steps
        if num_inference_steps is not None and num_inference_steps != sum(steps):
            if num_inference_steps < len(steps):
                raise InvalidConfig(
                    f"RALU has {len(steps)} stages and can't run {num_inference_steps} steps; ask for at least "
                    f"{len(steps)}, or leave num_inference_steps out for its own {sum(steps)}"
                )
            steps = proportional(settings.steps, num_inference_steps)
            notes.append(
                f"{num_inference_steps} steps were asked for: {'/'.join(map(str, settings.steps))} became "
                f"{'/'.join(map(str, steps))} and the matching was solved anew"
            )
        solved = matching.solve(steps, settings.ends, self.base_shift, self.restart, settings.starts)
        restarted = "" if solved.restart is None else f"restart Z {solved.restart:.3f}; "
        notes.append(
            f"shifts {', '.join(f'{shift:.3f}' for shift in solved.shifts)}; {restarted}"
            f"matching distance {solved.distance:.4f}"
        )
        coarse = rows * columns // 4
        names, tokens = ["coarse", "fine"], [coarse, rows * columns]
        if len(steps) == 3:
            names.insert(1, "mixed")
            tokens.insert(1, coarse + 3 * self.refined_count(rows, columns))
            if self.refined_count(rows, columns) == 0:
                notes.append(
                    f"a share of {settings.ratio} of {coarse} coarse tokens is less than one, so stage 2 refines "
                    "nothing"
                )
        spans = zip(names, tokens, steps, [0.0, *solved.starts], [*settings.ends, 1.0], solved.shifts, strict=True)
        stages = tuple(
            StagePlan(index, name, count, number, matching.stage_sigmas(start, stop, shift, number))
            for index, (name, count, number, start, stop, shift) in enumerate(spans)
        )
        return SchedulePlan(stages, rows, columns, tuple(notes))

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        return _RALURun(self, plan, family, pipeline, generator)


class _RALURun(ScheduleRun):
    """The layout that one run stands in, the noise that it began with, and its switches."""

    def __init__(self, ralu: RALU, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> None:
        self._ralu = ralu
        self._plan = plan
        self._family = family
        self._pipeline = pipeline
        self._generator = generator
        self._exact = ralu.fidelity == "exact"
        self._rows, self._columns = plan.rows, plan.columns
        self._coarse = TokenLayout(plan.rows, plan.columns, coarse=True, frame=ralu.frame)
        self._fine = TokenLayout(plan.rows, plan.columns, coarse=False)
        self._layout = self._fine
        self._field: torch.Tensor | None = None
        self._begun: torch.Tensor | None = None

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        self._field = self._family.tokens(latents)
        self._layout = self._coarse
        # The sum of four unit normals over two is a unit normal, so seeds and `latents=` keep their meaning.
        noise = pooled(self._family, self._field, self._rows, self._columns).to(latents.dtype)
        return self._family.latents(noise, self._layout), self._layout

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        if self._plan.stages[stage].layout == "fine":
            self._layout = self._fine
            return latents, self._fine
        tokens = self._family.tokens(latents)
        frames = self._family.unpack(tokens, self._rows, self._columns).float()
        batches = len(tokens) // len(clean)
        self._field = self._family.pack((frames - (1.0 - sigma) * clean.float().repeat(batches, 1, 1, 1)) / sigma)
        own = torch.nn.functional.avg_pool2d(clean.float(), 2)
        picture = (1.0 - sigma) * own.repeat(batches, 1, 1, 1)
        # The picture is averaged as pictures are, and its noise so that it stays a unit normal.
        averaged = picture + 2.0 * (torch.nn.functional.avg_pool2d(frames, 2) - picture)
        coarse = self._family.pack(averaged.to(latents.dtype))
        self._layout = self._coarse
        if self._plan.stages[stage].layout == "mixed":
            if self._begun is None:
                self._begun = self._select(self._family.pack(own).to(latents.dtype))
            mixed, self._layout = self._layout.refine(coarse, self._begun)
            children = gather_tokens(tokens, self._layout.cells(self._begun.sort(dim=1).values))
            coarse = torch.cat([mixed[:, : mixed.shape[1] - children.shape[1]], children], dim=1)
        return self._family.latents(coarse, self._layout), self._layout

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        assert self._field is not None
        before, following = self._layout, self._plan.stages[stage + 1]
        tokens, clean = self._family.tokens(latents), self._family.tokens(denoised)
        after = before.refined_at(self._select(clean)) if following.layout == "mixed" else self._fine
        starts = cast(tuple[float, ...], following.sigmas)
        lifted = self._ralu.settings.lift(
            Switch(
                self._family,
                self._pipeline,
                before,
                after,
                tokens,
                clean,
                self._field,
                self._ralu.settings.ends[stage],
                1.0 - starts[0],
                self._noise,
                self._exact,
            )
        )
        self._layout = after
        return self._family.latents(lifted.to(latents.dtype), after), after

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self._layout.to_raster(self._layout.complete(self._family.tokens(latents)))
        return self._family.latents(tokens, self._fine)

    def _select(self, denoised: torch.Tensor) -> torch.Tensor:
        rows, columns = self._rows // 2, self._columns // 2
        count = self._ralu.refined_count(self._rows, self._columns)
        frames = self._family.unpack(denoised, rows, columns)
        pixels = self._family.decode(self._pipeline, frames)
        scores = edges.edge_scores(pixels, rows, columns, paper=not self._exact)
        if not self._exact:
            scores = scores + 1e-6 * self._noise(scores.shape, torch.device("cpu"))
        return edges.top_tokens(scores, count).to(denoised.device)

    def _noise(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        noise: torch.Tensor = randn_tensor(tuple(shape), generator=self._generator, device=device, dtype=torch.float32)
        return noise


def proportional(steps: Sequence[int], total: int) -> tuple[int, ...]:
    """Share `total` steps out in proportion to `steps`, at least one each, by largest remainder."""
    exact = [total * count / sum(steps) for count in steps]
    shares = [max(1, int(value)) for value in exact]
    while sum(shares) < total:
        index = max(range(len(shares)), key=lambda i: exact[i] - shares[i])
        shares[index] += 1
    while sum(shares) > total:
        index = min((i for i in range(len(shares)) if shares[i] > 1), key=lambda i: exact[i] - shares[i])
        shares[index] -= 1
    return tuple(shares)


def _plain(value: Any) -> Any:
    """Turn a whole number of another library into Python's own; anything else is left for validation."""
    return value if isinstance(value, (bool, float)) or not hasattr(value, "__index__") else operator.index(value)


def _listed(recipes: Mapping[str, _Recipe]) -> str:
    return ", ".join(f"{name} ({recipe.family})" for name, recipe in recipes.items())


def _validate(settings: _Recipe, restart: float | None, base_shift: float, fidelity: str) -> None:
    steps, ends, starts = settings.steps, settings.ends, settings.starts
    if not isinstance(steps, tuple) or len(steps) not in (2, 3) or not all(is_count(count, 1) for count in steps):
        raise InvalidConfig(f"RALU needs two or three step counts of at least 1, got steps={steps!r}")
    if not _rising(ends, len(steps) - 1):
        raise InvalidConfig(
            f"{len(steps)} stages need {len(steps) - 1} end time{'s that rise' if len(steps) == 3 else ''} between 0 "
            f"and 1, got ends={ends!r}"
        )
    if len(steps) == 3 and (not is_number(settings.ratio) or not 0.0 < cast(float, settings.ratio) < 1.0):
        raise InvalidConfig(
            f"a mixed stage refines a share of tokens between 0 and 1 (exclusive), got ratio={settings.ratio!r}"
        )
    if len(steps) == 2 and settings.ratio is not None:
        raise InvalidConfig(
            f"two stages have none between them that would refine a share, got ratio={settings.ratio!r}"
        )
    if restart is not None and not (is_number(restart) and restart >= 2.0):
        raise InvalidConfig(f"restart must be at least 2 for the noise's covariance to exist, got {restart!r}")
    if starts is not None:
        if restart is not None:
            raise InvalidConfig("starts and restart both say where stages start; give one of them")
        if not isinstance(starts, tuple) or len(starts) != len(ends) or not all(map(_is_time, starts)):
            raise InvalidConfig(f"{len(ends)} switches need as many start times between 0 and 1, got {starts!r}")
        settings.lift.check(ends, starts)
    if not is_number(base_shift) or base_shift <= 0.0:
        raise InvalidConfig(f"base_shift must be positive, got {base_shift!r}")
    if fidelity not in ("exact", "paper"):
        raise InvalidConfig(f'fidelity is "exact" or "paper", got {fidelity!r}')


def _is_time(value: Any) -> bool:
    return is_number(value) and 0.0 < value < 1.0


def _rising(times: Any, count: int) -> bool:
    """Whether these are so many rising times between noise and data."""
    return (
        isinstance(times, tuple)
        and len(times) == count
        and all(map(_is_time, times))
        and all(early < late for early, late in pairwise(times))
    )
