"""Where a forward stands: the stages of a run, and a step in them."""

from __future__ import annotations

from dataclasses import dataclass

#: The number of no step: that of a forward outside of the loop, before its first step or after its last one.
OUTSIDE = -1


@dataclass(frozen=True)
class StepContext:
    """Where a forward stands: all that a gate may know besides its signal. Steps count forwards of one branch.

    `skipped_timesteps` counts the scheduler's timesteps before the run's first (an img2img strength below 1). `forced`
    says why the schedule wants every block run on every token.
    """

    step: int
    total_steps: int
    stage: int
    stage_step: int
    branch: str
    skipped_timesteps: int = 0
    forced: str | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run: its noise levels and its tokens.

    `sigmas` has one entry more than the stage has steps (its last is the stage's end), or is None where the
    pipeline's own scheduler decides. `tokens` counts image tokens, None where the model's layout is unknown.
    """

    index: int
    layout: str
    tokens: int | None
    steps: int
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SchedulePlan:
    """The stages that a schedule chose for one image size and step count, with remarks for the reader."""

    stages: tuple[StagePlan, ...]
    rows: int
    columns: int
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, index: int) -> tuple[int, int]:
        """Give the stage of a step of the run, and its number in that stage."""
        stage = 0
        while stage + 1 < len(self.stages) and index >= self.stages[stage].steps:
            index -= self.stages[stage].steps
            stage += 1
        return stage, index
