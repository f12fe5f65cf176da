"""The schedule level: what owns the timesteps and the token layout of a run's stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fastdit.accelerator import Accelerator, Break, Change, Level, Need
from fastdit.step import SchedulePlan, StagePlan

if TYPE_CHECKING:
    import torch

    from fastdit.blocks.chain import Pass
    from fastdit.layout import TokenLayout
    from fastdit.models.autoencoders import Coding
    from fastdit.models.family import Family, Pipeline


@dataclasses.dataclass(frozen=True)
class Schedule(Accelerator):
    """An accelerator that owns the timesteps and the token layout of a run's stages.

    What it declares here holds for every schedule; one that places tokens needs `Need.TOKEN_POSITIONS` as well.
    """

    level: ClassVar[Level] = Level.SCHEDULE
    changes: ClassVar[frozenset[Change]] = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FRAME_SIZES, Need.WHOLE_FRAME})
    breaks: ClassVar[frozenset[Break]] = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    def of(self, family: Family) -> Schedule:
        """Give the schedule with what it takes from a pipeline's family; most take nothing."""
        return self

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Choose the stages for a grid of `rows` x `columns` image tokens; None means the schedule's own count."""
        raise NotImplementedError

    def codings(self, before: StagePlan, after: StagePlan, cells: int) -> Sequence[tuple[Coding, int]]:
        """Say what the switch between two stages asks of the autoencoder, each of how many of the grid's `cells`."""
        return ()

    def begin(
        self,
        plan: SchedulePlan,
        family: Family,
        pipeline: Pipeline,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> ScheduleRun:
        """Make the state of one run."""
        raise NotImplementedError


class ScheduleRun:
    """What a schedule does in one run; made by `Schedule.begin` and dropped at the run's end."""

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Turn the pipeline's full-size unit noise into the first stage's latents and layout.

        Latents are in the pipeline's own shape throughout. Every forward of the first step calls this with its own
        batch, so it depends on nothing but the noise.
        """
        raise NotImplementedError

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Turn a picture with noise of level `sigma`, at full size, into the latents and layout of `stage`.

        A run that does not begin with noise alone begins there; `clean` are the picture's own latents. Like `initial`
        it is called by every forward of the first step.
        """
        raise NotImplementedError

    def forced(self, stage: int, stage_step: int) -> str | None:
        """Say why a step must run every block on every token, whatever caches would do; None where they decide."""
        return None

    def passes(self) -> Sequence[Pass]:
        """Give passes of its own that act beside the attention, inside of all that decides which blocks run."""
        return ()

    def observe(self, velocity: torch.Tensor) -> None:
        """See the velocity that a step was taken with, in the pipeline's shape; nothing by default."""

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Turn the last latents of `stage` into the next stage's, given the estimate of the clean latents."""
        raise NotImplementedError

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring latents of whatever stage the run stands in to the full grid, for a run that was interrupted."""
        raise NotImplementedError
