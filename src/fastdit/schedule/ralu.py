"""RALU: half-resolution first, then edge regions at full resolution, then everything (arXiv 2507.08422).

The stages share one run: the first on a quarter of the tokens, the second with the most edge-rich coarse tokens split
in four, the last on all. At each switch a *lift* brings the tokens to the next stage and to an earlier time, so that
they follow the flow's own marginal there, and NT-matching spaces the timesteps.

`RALU.paper("4x")` is the published recipe. `RALU("4x")` takes its numbers and mends three flaws of the published code
(fidelity="exact", the default): tokens that are not copied get the right variance, edges in dark areas are seen, and
ties go to raster order instead of to noise. Under both, noise comes from the user's generator, fresh for each call and
image, and every image of a batch has its own selection. Two stages of whole frames are `ProgressiveResolution`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from fastdit.accelerator import Change, Effects, Need
from fastdit.config import Range, register
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.family import Pipeline, Transformer, family_of
from fastdit.schedule.preset_schedule import PresetSchedule
from fastdit.schedule.presets import RALU_PRESETS, REGIONS, WHOLE_PRESETS, listed
from fastdit.schedule.recipe import Between, Frame
from fastdit.schedule.selectors.base import Seen, Selector


@register
@dataclasses.dataclass(frozen=True)
class RALU(PresetSchedule):
    """Region-adaptive latent upsampling in three stages: coarse, then edge regions at full size, then everything.

    At a switch from the time e on one layout to the time s < e on the next, copied tokens are re-noised,

        y = (x_e + Z (1 - e) z) / D,   D = Z (1 - e) + e,   s = e / D,

    and a clean estimate x0 that was lifted becomes y = s x0 + (1 - s) z. Times run from 0 (noise) to 1 (data).

    Args:
        preset: a setting of the model's family by how many times fewer FLOPs it costs than plain sampling: "4x", "5x"
            and "7x" of FLUX.1, "2x" and "3x" of SD3. `RALU()` takes the first of the pipeline's own. What is given
            beside it takes the place of the preset's; without a preset, `steps`, `ends` and `ratio` are needed.
        steps: how many a stage (coarse, mixed, fine), each at least 1.
        ends: the times at which the first two stages end, rising, between 0 and 1.
        ratio: the share of coarse tokens, between 0 and 1, that the mixed stage refines.
        selector: by what it chooses them: `Edges()` (the paper's, and the default), `PixelGradient()`,
            `VelocityVariance()` or `TextAttention()`.
        lift: what happens at a switch: `TokenCopy()` (the paper's, and the default), `PixelLift()` or
            `LatentLift(resize=...)`.

    And to tinker with:
        starts: the times at which all stages but the first start. Left out, they are s of the times before them, with
            one Z that `restart` fixes (at least 2; larger restarts closer to noise) and the matching solves otherwise.
        shifts: one timestep shift a stage, .01 to 100, for which `starts` are needed: above 1 a stage takes its smaller
            steps where there is more noise, below 1 where there is less. Left out, the matching solves them.
        base_shift: the timestep shift, .01 to 100, that the model was trained for (3 for both families).
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

    _: dataclasses.KW_ONLY
    ratio: Between | None = None
    restart: Annotated[float, Range(at_least=2)] | None = None
    selector: Selector | None = None
    fidelity: Literal["exact", "paper"] = "exact"
    frame: Frame = "coarse"

    needs: ClassVar = frozenset({Need.TOKEN_POSITIONS})
    layouts: ClassVar = REGIONS
    presets: ClassVar = RALU_PRESETS

    def check_values(self) -> None:
        if self.preset in set(WHOLE_PRESETS) - set(RALU_PRESETS):
            raise InvalidConfig(
                f"RALU has no preset {self.preset!r}, which is one of whole frames: write ProgressiveResolution("
                f"{self.preset!r}), or choose one of {listed(RALU_PRESETS)}"
            )
        if self.steps is not None and len(self.steps) == 2:
            raise InvalidConfig(
                "RALU refines regions in a stage of its own and takes three step counts; for two stages of whole "
                f"frames write ProgressiveResolution(steps={self.steps}, ...)"
            )
        super().check_values()

    @classmethod
    def paper(cls, preset: str = "4x", *, fidelity: Literal["exact", "paper"] = "paper", **settings: Any) -> RALU:
        """Give the paper's recipe of a preset; fidelity="exact" mends the flaws of its code, `settings` change it."""
        if preset not in RALU_PRESETS:
            raise InvalidConfig(f"the paper has no preset {preset!r}; choose one of {listed(RALU_PRESETS)}")
        recipe = RALU_PRESETS[preset]
        published = {"steps": recipe.steps, "ends": recipe.ends, "ratio": recipe.ratio}
        return cls(fidelity=fidelity, **{**published, **settings})

    @property
    def settings(self) -> dict[str, Any]:
        names = ("ratio", "restart", "selector", "frame")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**super().settings, **given, "exact": self.fidelity == "exact"}

    @property
    def effects(self) -> Effects:
        declared = super().effects
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
        super().check(pipeline, transformer)
