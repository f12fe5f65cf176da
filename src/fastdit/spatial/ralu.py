"""RALU: half-resolution first, then edge regions at full resolution, then everything (arXiv 2507.08422).

Three stages share one run: the first on a quarter of the tokens, the second with the most edge-rich coarse tokens
split in four, the third on all. At each switch the latents are copied and re-noised to an earlier time so that they
follow the flow's own marginal, and NT-matching spaces the timesteps.

Differences from the paper: with fidelity="exact" (the default) tokens that are not copied get the right variance,
edges in dark areas are seen, and ties go to raster order instead of to noise; noise is drawn from the user's
generator, fresh for each call and image; every image of a batch has its own selection. fidelity="paper" follows the
published behaviour in these points except for the noise's source.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

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

from . import edges, matching, renoise


@dataclasses.dataclass(frozen=True)
class _Preset:
    steps: tuple[int, int, int]
    ends: tuple[float, float]
    ratio: float
    family: str | None = dataclasses.field(default=None, compare=False)


#: The published settings, each for the family of models that it was published for.
PRESETS = {
    "4x": _Preset((5, 6, 7), (0.30, 0.45), 0.3, "FLUX.1"),
    "5x": _Preset((4, 5, 6), (0.30, 0.45), 0.2, "FLUX.1"),
    "7x": _Preset((2, 3, 5), (0.20, 0.30), 0.1, "FLUX.1"),
    "2x": _Preset((5, 6, 9), (0.20, 0.30), 0.3, "Stable Diffusion 3"),
    "3x": _Preset((3, 3, 6), (0.25, 0.30), 0.2, "Stable Diffusion 3"),
}


@register
@dataclasses.dataclass(frozen=True)
class RALU(Schedule):
    """Region-adaptive latent upsampling in three stages.

    `preset` names a published setting of the model's family ("4x", the default, "5x" and "7x" of FLUX.1, "2x" and "3x"
    of SD3): `steps` (one count a stage), `ends` (the times at which stages 1 and 2 end, 0 = noise, 1 = data) and
    `ratio` (the share of coarse tokens refined in stage 2). What is given beside it takes the place of the preset's;
    without a preset all three are needed. `restart` fixes Z (at least 2; larger restarts closer to noise) and is solved
    otherwise. `base_shift` is the timestep shift that the model was trained for (3 for both families).

    `frame` says where stages 1 and 2 place their tokens: in the "coarse" frame, as if the picture were half as large,
    with children between the coarse tokens (published for FLUX, and what the model sees at half the size), or in the
    "fine" frame, with children at their final places and coarse tokens in the middle of their four cells.

    Raises `InvalidConfig` for an unknown preset and for values out of range.
    """

    preset: str | None = None
    _: dataclasses.KW_ONLY
    steps: tuple[int, int, int] | None = None
    ends: tuple[float, float] | None = None
    ratio: float | None = None
    restart: float | None = None
    base_shift: float = 3.0
    fidelity: str = "exact"
    frame: str = "coarse"

    changes: ClassVar = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar = frozenset({Need.TOKEN_POSITIONS, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    def __post_init__(self) -> None:
        for name in ("steps", "ends"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(_plain(item) for item in value))
        custom = (self.steps, self.ends, self.ratio)
        if self.preset is None and all(value is None for value in custom):
            object.__setattr__(self, "preset", "4x")
        if self.preset is not None and self.preset not in PRESETS:
            known = ", ".join(f"{name} ({preset.family})" for name, preset in PRESETS.items())
            raise InvalidConfig(f"RALU has no preset {self.preset!r}; choose one of {known}")
        if self.preset is None and any(value is None for value in custom):
            raise InvalidConfig("RALU without a preset needs all of steps=(a, b, c), ends=(e1, e2) and ratio")
        _validate(self.settings, self.restart, self.base_shift, self.fidelity)
        if self.frame not in FRAMES:
            raise InvalidConfig(f'frame is "coarse" or "fine", got {self.frame!r}')

    @property
    def settings(self) -> _Preset:
        """The steps, ends and ratio in force."""
        own = {name: getattr(self, name) for name in ("steps", "ends", "ratio") if getattr(self, name) is not None}
        return _Preset(**own) if self.preset is None else dataclasses.replace(PRESETS[self.preset], **own)

    def check(self, pipeline: Any, transformer: Any) -> None:
        """Raise `InvalidConfig` for a preset of another family of models."""
        family = family_of(pipeline)
        if family is None or self.preset is None or PRESETS[self.preset].family == family.name:
            return
        own = ", ".join(name for name, preset in PRESETS.items() if preset.family == family.name) or "none"
        raise InvalidConfig(
            f"RALU's preset {self.preset!r} was published for {PRESETS[self.preset].family}, and "
            f"{type(pipeline).__name__} is {family.name}, whose presets are: {own}; choose one of them, or give steps, "
            "ends and ratio"
        )

    def refined_count(self, rows: int, columns: int) -> int:
        """How many coarse tokens of a `rows` x `columns` fine grid are split in stage 2."""
        return int(self.settings.ratio * (rows * columns // 4))

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the three stages. Raises `InvalidConfig` for sizes that don't halve and for too few steps."""
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
        solved = matching.solve(steps, settings.ends, self.base_shift, self.restart)
        notes.append(
            f"shifts {', '.join(f'{shift:.3f}' for shift in solved.shifts)}; restart Z {solved.restart:.3f}; "
            f"matching distance {solved.distance:.4f}"
        )
        if self.refined_count(rows, columns) == 0:
            notes.append(
                f"a share of {self.settings.ratio} of {rows * columns // 4} coarse tokens is less than one, so stage 2 "
                "refines nothing"
            )
        starts = [0.0, *(matching.restart_time(end, solved.restart) for end in settings.ends)]
        stops = [*settings.ends, 1.0]
        coarse = rows * columns // 4
        tokens = [coarse, coarse + 3 * self.refined_count(rows, columns), rows * columns]
        stages = tuple(
            StagePlan(index, name, count, number, matching.stage_sigmas(start, stop, shift, number))
            for index, (name, count, number, start, stop, shift) in enumerate(
                zip(("coarse", "mixed", "fine"), tokens, steps, starts, stops, solved.shifts, strict=True)
            )
        )
        return SchedulePlan(stages, rows, columns, tuple(notes))

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        return _RALURun(self, plan, family, pipeline, generator)


class _RALURun(ScheduleRun):
    """The layout that one run stands in, and its two switches."""

    def __init__(self, ralu: RALU, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> None:
        self._ralu = ralu
        self._family = family
        self._pipeline = pipeline
        self._generator = generator
        self._exact = ralu.fidelity == "exact"
        self._restart = matching.solve(
            tuple(stage.steps for stage in plan.stages), ralu.settings.ends, ralu.base_shift, ralu.restart
        ).restart
        self._rows, self._columns = plan.rows, plan.columns
        self._fine = TokenLayout(plan.rows, plan.columns, coarse=False)
        self._layout = self._fine
        self._begun: torch.Tensor | None = None

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        frames = self._family.unpack(self._family.tokens(latents), self._rows, self._columns)
        # The sum of four unit normals over two is a unit normal, so seeds and `latents=` keep their meaning.
        pooled = torch.nn.functional.avg_pool2d(frames.float(), 2).mul(2.0).to(latents.dtype)
        self._layout = TokenLayout(self._rows, self._columns, coarse=True, frame=self._ralu.frame)
        return self._family.latents(self._family.pack(pooled), self._layout), self._layout

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        if stage == 2:
            self._layout = self._fine
            return latents, self._fine
        tokens = self._family.tokens(latents)
        batch = tokens.shape[0]
        frames = self._family.unpack(tokens, self._rows, self._columns).float()
        own = torch.nn.functional.avg_pool2d(clean.float(), 2)
        picture = (1.0 - sigma) * own.repeat(batch // len(own), 1, 1, 1)
        # The picture is averaged as pictures are, and its noise so that it stays a unit normal.
        pooled = picture + 2.0 * (torch.nn.functional.avg_pool2d(frames, 2) - picture)
        coarse = self._family.pack(pooled.to(latents.dtype))
        self._layout = TokenLayout(self._rows, self._columns, coarse=True, frame=self._ralu.frame)
        if stage == 1:
            if self._begun is None:
                self._begun = self._select(self._family.pack(own).to(latents.dtype))
            mixed, self._layout = self._layout.refine(coarse, self._begun)
            children = gather_tokens(tokens, self._layout.cells(self._begun.sort(dim=1).values))
            coarse = torch.cat([mixed[:, : mixed.shape[1] - children.shape[1]], children], dim=1)
        return self._family.latents(coarse, self._layout), self._layout

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        tokens = self._family.tokens(latents)
        if stage == 0:
            selected = self._select(self._family.tokens(denoised))
            tokens, self._layout = self._layout.refine(tokens, selected)
            groups = slice(tokens.shape[1] - 4 * selected.shape[1], None)
            tokens = self._renoised(tokens, groups, self._ralu.settings.ends[0])
        else:
            mixed, self._layout = self._layout, self._fine
            new_children = slice(0, 4 * mixed.kept.shape[1])  # type: ignore[union-attr]
            tokens = self._renoised(mixed.complete(tokens), new_children, self._ralu.settings.ends[1])
            tokens = mixed.to_raster(tokens)
        return self._family.latents(tokens, self._layout), self._layout

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

    def _renoised(self, tokens: torch.Tensor, groups: slice, end: float) -> torch.Tensor:
        noise = self._noise(tokens.shape, tokens.device)
        return renoise.renoise(tokens, noise, groups, end, self._restart, exact=self._exact)

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


def _validate(settings: _Preset, restart: float | None, base_shift: float, fidelity: str) -> None:
    if len(settings.steps) != 3 or not all(is_count(n, 1) for n in settings.steps):
        raise InvalidConfig(f"RALU needs three step counts of at least 1, got steps={settings.steps!r}")
    if (
        len(settings.ends) != 2
        or not all(map(is_number, settings.ends))
        or not 0.0 < settings.ends[0] < settings.ends[1] < 1.0
    ):
        raise InvalidConfig(f"RALU needs two rising end times between 0 and 1, got ends={settings.ends!r}")
    if not is_number(settings.ratio) or not 0.0 < settings.ratio < 1.0:
        raise InvalidConfig(f"RALU refines a share of tokens between 0 and 1 (exclusive), got ratio={settings.ratio!r}")
    if restart is not None and not (is_number(restart) and restart >= 2.0):
        raise InvalidConfig(f"restart must be at least 2 for the noise's covariance to exist, got {restart!r}")
    if not is_number(base_shift) or base_shift <= 0.0:
        raise InvalidConfig(f"base_shift must be positive, got {base_shift!r}")
    if fidelity not in ("exact", "paper"):
        raise InvalidConfig(f'fidelity is "exact" or "paper", got {fidelity!r}')
