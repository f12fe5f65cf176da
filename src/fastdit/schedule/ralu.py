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
from typing import Any, ClassVar

from fastdit.accelerator import (
    Break,
    Change,
    Effects,
    Need,
)
from fastdit.config import register
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.layout import FRAMES
from fastdit.models.family import Family, family_of
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.recipe import (
    PAPER,
    PRESETS,
    Recipe,
    listed,
)
from fastdit.schedule.selectors.base import Seen, Selector
from fastdit.schedule.staged import StagedRun, staged_plan
from fastdit.step import SchedulePlan


@register
@dataclasses.dataclass(frozen=True)
class RALU(Schedule):
    """Region-adaptive latent upsampling in two or three stages.

    `preset` names a setting of the model's family ("4x", the default, "5x", "7x", "10x" and "14x" of FLUX.1, "2x",
    "3x", "6x" and "9x" of SD3). What is given beside it takes the place of the preset's; without a preset, `steps` and
    `ends` are needed:

    - `steps`: how many a stage, two (coarse, fine) or three (coarse, mixed, fine) of them.
    - `ends`: the times at which all stages but the last end (0 = noise, 1 = data).
    - `ratio`: the share of coarse tokens that a mixed stage refines; needed where there is one.
    - `starts`: the times at which all stages but the first start. Left out, they are s = e / (Z (1 - e) + e) of the
      times before them, with one Z that `restart` fixes (at least 2; larger restarts closer to noise) and that the
      matching solves otherwise.
    - `shifts`: one timestep shift a stage, for which `starts` are needed: above 1 a stage takes its smaller steps where
      there is more noise, below 1 where there is less. Left out, the matching solves them.
    - `selector`: by what a mixed stage chooses them: `Edges()` (the paper's, and the default), `PixelGradient()`,
      `VelocityVariance()` or `TextAttention()`.
    - `lift`: what happens at a switch: `TokenCopy()` (the paper's; without a preset the default), `PixelLift()` or
      `LatentLift(resize=...)`.

    `base_shift` is the timestep shift that the model was trained for (3 for both families). `frame` says where coarse
    and mixed stages place their tokens: in the "coarse" frame, as if the picture were half as large, with children
    between the coarse tokens (published for FLUX, and what the model sees at half the size), or in the "fine" frame,
    with children at their final places and coarse tokens in the middle of their four cells. With frame="query" a coarse
    stage is as in the coarse frame, and in a mixed one every query sees keys in steps of its own resolution
    (`fastdit.schedule.query_frame`), which takes a model that turns queries and keys by places, as FLUX does.

    Raises `InvalidConfig` for an unknown preset and for values out of range.
    """

    preset: str | None = None
    _: dataclasses.KW_ONLY
    steps: tuple[int, ...] | None = None
    ends: tuple[float, ...] | None = None
    ratio: float | None = None
    starts: tuple[float, ...] | None = None
    restart: float | None = None
    shifts: tuple[float, ...] | None = None
    selector: Selector | None = None
    lift: Lift | None = None
    base_shift: float = 3.0
    fidelity: str = "exact"
    frame: str = "coarse"

    changes: ClassVar = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar = frozenset({Need.FRAME_SIZES, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    def __post_init__(self) -> None:
        for name in ("steps", "ends", "starts", "shifts"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(_plain(item) for item in value))
        if self.preset is None and all(value is None for value in (self.steps, self.ends, self.ratio, self.starts)):
            object.__setattr__(self, "preset", "4x")
        if self.preset is not None and self.preset not in PRESETS:
            raise InvalidConfig(f"RALU has no preset {self.preset!r}; choose one of {listed(PRESETS)}")
        if self.preset is None and (self.steps is None or self.ends is None):
            raise InvalidConfig(
                "RALU without a preset needs steps=(a, b) and ends=(e,), or three steps, two ends and ratio"
            )
        if not isinstance(self.lift, Lift | None):
            raise InvalidConfig(f"lift is a lift such as PixelLift() or TokenCopy(), got {self.lift!r}")
        if not isinstance(self.selector, Selector | None):
            raise InvalidConfig(f"selector is a selector such as Edges(), got {self.selector!r}")
        self.settings.check(self.restart, self.base_shift, self.fidelity)
        if self.selector is not None and len(self.settings.steps) != 3:
            raise InvalidConfig(f"{self.selector!r} chooses for a mixed stage, and two stages have none between them")
        if self.frame not in (*FRAMES, "query"):
            raise InvalidConfig(f'frame is "coarse", "fine" or "query", got {self.frame!r}')
        if self.frame == "query" and len(self.settings.steps) != 3:
            raise InvalidConfig('frame="query" is of a mixed stage, and two stages have none; use frame="coarse"')

    @classmethod
    def paper(cls, preset: str = "4x", *, fidelity: str = "paper", **settings: Any) -> RALU:
        """Give the paper's recipe of a preset; fidelity="exact" mends the flaws of its code, `settings` change it."""
        if preset not in PAPER:
            raise InvalidConfig(f"the paper has no preset {preset!r}; choose one of {listed(PAPER)}")
        recipe = PAPER[preset]
        published = {"steps": recipe.steps, "ends": recipe.ends, "ratio": recipe.ratio}
        return cls(fidelity=fidelity, **{**published, **settings})

    @property
    def settings(self) -> Recipe:
        """The recipe in force."""
        names = ("steps", "ends", "ratio", "starts", "shifts", "lift")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.preset is None:
            return Recipe(**own)
        if self.restart is not None:
            own |= {"starts": None, "shifts": None}
        return dataclasses.replace(PRESETS[self.preset], **own)

    @property
    def effects(self) -> Effects:
        declared = super().effects
        if len(self.settings.steps) == 3 or self.frame != "coarse":
            declared = declared.adding(needs={Need.TOKEN_POSITIONS})
        if self.frame == "query":
            needs = {Need.SEEN_ATTENTION, Need.PLAIN_ATTENTION, Need.FIXED_ROWS}
            declared = declared.adding(changes={Change.KEY_PLACES}, needs=needs)
        if self.selector is not None and self.selector.sees is Seen.TEXT_ATTENTION:
            declared = declared.adding(needs={Need.SEEN_ATTENTION, Need.PLAIN_ATTENTION})
        return declared

    def check(self, pipeline: Any, transformer: Any) -> None:
        """Raise `InvalidConfig` for another family's preset, `UnsupportedModel` for parts that the model can't bear."""
        family = family_of(pipeline)
        if self.frame == "query" and family is not None and family.one_frame is not None:
            raise UnsupportedModel(
                f'{self.describe()}: with frame="query" a query and a key are turned by places of the query\'s own '
                f"frame, and {type(pipeline).__name__} can't be asked for that: {family.one_frame}; use "
                'frame="coarse" or frame="fine"'
            )
        if self.selector is not None:
            self.selector.check(transformer)
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
        settings, refined = self.settings, self.refined_count(rows, columns)
        notes: tuple[str, ...] = ()
        if len(settings.steps) == 3 and refined == 0:
            notes = (
                f"a share of {settings.ratio} of {rows * columns // 4} coarse tokens is less than one, so stage 2 "
                "refines nothing",
            )
        plan = staged_plan(
            "RALU",
            ("coarse", "fine") if len(settings.steps) == 2 else ("coarse", "mixed", "fine"),
            rows,
            columns,
            num_inference_steps,
            steps=settings.steps,
            ends=settings.ends,
            starts=settings.starts,
            restart=self.restart,
            shifts=settings.shifts,
            base_shift=self.base_shift,
            refined=refined,
            notes=notes,
        )
        if self.selector is not None and self.selector.sees is Seen.VELOCITIES and plan.stages[0].steps < 2:
            raise InvalidConfig(
                f"{self.selector!r} compares the steps of the coarse stage, which has one here; give it two or more"
            )
        return plan

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(
            plan,
            family,
            pipeline,
            generator,
            lift=self.settings.lift,
            ends=self.settings.ends,
            refined=self.refined_count(plan.rows, plan.columns),
            selector=self.selector,
            frame=self.frame,
            exact=self.fidelity == "exact",
        )


def _plain(value: Any) -> Any:
    """Turn a whole number of another library into Python's own; anything else is left for validation."""
    return value if isinstance(value, (bool, float)) or not hasattr(value, "__index__") else operator.index(value)
