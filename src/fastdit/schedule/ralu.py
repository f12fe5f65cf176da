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
from typing import Annotated, Any, Literal

from fastdit.accelerator import Change, Effects, Need
from fastdit.config import Count, Positive, Range, register
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.family import Family, Pipeline, Transformer, family_of
from fastdit.schedule.base import ScheduleRun
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.presets import PAPER, PRESETS, THREE, TWO, listed, of_family
from fastdit.schedule.recipe import Between, Frame, Recipe, check_schedule
from fastdit.schedule.selectors.base import Seen, Selector
from fastdit.schedule.staged import Generators, StagedRun, StagedSchedule
from fastdit.step import SchedulePlan


@register
@dataclasses.dataclass(frozen=True)
class RALU(StagedSchedule):
    """Region-adaptive latent upsampling in two or three stages.

    At a switch from the time e on one layout to the time s < e on the next, copied tokens are re-noised,

        y = (x_e + Z (1 - e) z) / D,   D = Z (1 - e) + e,   s = e / D,

    and a clean estimate x0 that was lifted becomes y = s x0 + (1 - s) z. Times run from 0 (noise) to 1 (data).

    Args:
        preset: a setting of the model's family by how many times fewer FLOPs it costs than plain sampling: "4x", "5x",
            "7x", "10x" and "14x" of FLUX.1, "2x", "3x", "6x" and "9x" of SD3. `RALU()` takes the first of the
            pipeline's own. What is given beside it takes the place of the preset's; without a preset, `steps` and
            `ends` are needed.
        steps: how many a stage, two (coarse, fine) or three (coarse, mixed, fine) of them, each at least 1.
        ends: the times at which all stages but the last end, rising, between 0 and 1.
        ratio: the share of coarse tokens, between 0 and 1, that a mixed stage refines; needed where there is one.
        selector: by what a mixed stage chooses them: `Edges()` (the paper's, and the default), `PixelGradient()`,
            `VelocityVariance()` or `TextAttention()`.
        lift: what happens at a switch: `TokenCopy()` (the paper's; without a preset the default), `PixelLift()` or
            `LatentLift(resize=...)`.

    And to tinker with:
        starts: the times at which all stages but the first start. Left out, they are s of the times before them, with
            one Z that `restart` fixes (at least 2; larger restarts closer to noise) and the matching solves otherwise.
        shifts: one timestep shift a stage, above 0, for which `starts` are needed: above 1 a stage takes its smaller
            steps where there is more noise, below 1 where there is less. Left out, the matching solves them.
        base_shift: the timestep shift, above 0, that the model was trained for (3 for both families).
        fidelity: "exact", or "paper" to repeat the flaws of the published code.
        frame: where coarse and mixed stages place their tokens: in the "coarse" frame, as if the picture were half as
            large, with children between the coarse tokens (published for FLUX, and what the model sees at half the
            size), or in the "fine" frame, with children at their final places and coarse tokens in the middle of their
            four cells. With "query" a coarse stage is as in the coarse frame, and in a mixed one every query sees keys
            in steps of its own resolution (`fastdit.schedule.query_frame`), which takes a model that turns queries and
            keys by places, as FLUX does.

    Raises:
        InvalidConfig: for an unknown preset, another family's, and values out of range.

    Paper: Jeong et al., Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion
    Transformers, arXiv 2507.08422.

    >>> schedule = RALU(steps=(5, 6, 7), ends=(0.3, 0.45), ratio=0.3)
    >>> [(stage.layout, stage.steps, stage.tokens) for stage in schedule.plan(64, 64, None).stages]
    [('coarse', 5, 1024), ('mixed', 6, 1945), ('fine', 7, 4096)]
    """

    preset: str | None = None
    _: dataclasses.KW_ONLY
    steps: Annotated[tuple[Count, ...], Range(at_least=2, at_most=3)] | None = None
    ends: tuple[Between, ...] | None = None
    ratio: Between | None = None
    starts: tuple[Between, ...] | None = None
    restart: Annotated[float, Range(at_least=2)] | None = None
    shifts: tuple[Positive, ...] | None = None
    selector: Selector | None = None
    lift: Lift | None = None
    base_shift: Positive = 3.0
    fidelity: Literal["exact", "paper"] = "exact"
    frame: Frame = "coarse"

    def __post_init__(self) -> None:
        check_schedule(self)
        if self.preset is not None and self.preset not in PRESETS:
            raise InvalidConfig(f"RALU has no preset {self.preset!r}; choose one of {listed(PRESETS)}")
        own = (self.steps, self.ends, self.ratio, self.starts)
        if self.preset is None and None in own[:2] and any(value is not None for value in own):
            raise InvalidConfig(
                "RALU without a preset needs steps=(a, b) and ends=(e,), or three steps, two ends and ratio"
            )
        self.recipe.check("RALU")
        if "mixed" not in self.recipe.layouts:
            if self.selector is not None:
                raise InvalidConfig(f"{self.selector!r} chooses for a mixed stage, and two stages have none")
            if self.frame == "query":
                raise InvalidConfig('frame="query" is of a mixed stage, and two stages have none; use frame="coarse"')

    @classmethod
    def paper(cls, preset: str = "4x", *, fidelity: Literal["exact", "paper"] = "paper", **settings: Any) -> RALU:
        """Give the paper's recipe of a preset; fidelity="exact" mends the flaws of its code, `settings` change it."""
        if preset not in PAPER:
            raise InvalidConfig(f"the paper has no preset {preset!r}; choose one of {listed(PAPER)}")
        recipe = PAPER[preset]
        published = {"steps": recipe.steps, "ends": recipe.ends, "ratio": recipe.ratio}
        return cls(fidelity=fidelity, **{**published, **settings})

    @property
    def recipe(self) -> Recipe:
        names = ("steps", "ends", "ratio", "starts", "shifts", "restart", "selector", "lift", "base_shift", "frame")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        own["exact"] = self.fidelity == "exact"
        if self.steps is not None:
            own["layouts"] = TWO if len(self.steps) == 2 else THREE
        if self.preset is None and self.steps is not None:
            return Recipe(**own)
        if self.restart is not None:
            own |= {"starts": None, "shifts": None}
        return dataclasses.replace(PRESETS[self.preset or next(iter(PRESETS))], **own)

    def of(self, family: Family) -> RALU:
        """Give the schedule with the preset of a pipeline's family, where it names none and has no steps.

        Raises `InvalidConfig` for another family's preset.
        """
        if self.preset is None and self.steps is not None:
            return self
        presets = of_family(family.name)
        if self.preset in presets:
            return self
        if self.preset is None and presets:
            return dataclasses.replace(self, preset=presets[0])
        asked = f"RALU's preset {self.preset!r} is for {self.recipe.family}" if self.preset else "RALU() takes a preset"
        raise InvalidConfig(
            f"{asked}, and the pipeline is {family.name}, whose presets are: {', '.join(presets) or 'none'}; choose "
            "one of them, or give steps and ends"
        )

    @property
    def effects(self) -> Effects:
        declared = super().effects
        if "mixed" in self.recipe.layouts or self.frame != "coarse":
            declared = declared.adding(needs={Need.TOKEN_POSITIONS})
        if self.frame == "query":
            needs = {Need.SEEN_ATTENTION, Need.PLAIN_ATTENTION, Need.FIXED_ROWS}
            declared = declared.adding(changes={Change.KEY_PLACES}, needs=needs)
        if self.recipe.selector.sees is Seen.TEXT_ATTENTION:
            declared = declared.adding(needs={Need.SEEN_ATTENTION, Need.PLAIN_ATTENTION})
        return declared

    def check(self, pipeline: Pipeline, transformer: Transformer) -> None:
        """Raise `InvalidConfig` for another family's preset, `UnsupportedModel` for parts that the model can't bear."""
        family = family_of(pipeline)
        if self.frame == "query" and family is not None and family.one_frame is not None:
            raise UnsupportedModel(
                f'{self.describe()}: with frame="query" a query and a key are turned by places of the query\'s own '
                f"frame, and {type(pipeline).__name__} can't be asked for that: {family.one_frame}; use "
                'frame="coarse" or frame="fine"'
            )
        self.recipe.selector.check(transformer)
        if family is not None:
            self.of(family)

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Pipeline, generator: Generators) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(self.of(family).recipe, plan, family, pipeline, generator)
