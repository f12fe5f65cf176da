"""MagnitudeCurve: how much the block stack's residual grows from one step to the next, for MagCache (2506.09045).

The authors publish each curve from the second step on and put 1.0 in front of it, for the first step, which has
none before it. Here the curves are whole: the first entry is that 1.0, and there are as many entries as steps.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, TypeAlias

from fastdit.config import Positive, Range, is_count, register
from fastdit.errors import InvalidConfig
from fastdit.step_cache.published import Measured

_Ratios: TypeAlias = Annotated[tuple[Positive, ...], Range(at_least=1)]


@register
@dataclasses.dataclass(frozen=True)
class MagnitudeCurve(Measured):
    """The ratio of each step's mean residual norm to the last step's, over a whole run.

    Args:
        ratios: one number above 0 a step, the first of them 1.
        unconditional: the second guidance branch's, as many; None where all branches share `ratios`.
        provenance: who measured them, on which model and on what.

    Raises:
        InvalidConfig: for other values.

    >>> MagnitudeCurve((1.0, 1.2, 0.8)).at(step=3, total_steps=5)
    0.8
    """

    ratios: _Ratios
    unconditional: _Ratios | None = None
    provenance: str = "given by the user"

    table: ClassVar = "magnitudes.json"
    what: ClassVar = "magnitude curves"
    measured_by: ClassVar = "calibrate_magcache"

    def check_values(self) -> None:
        super().check_values()
        if self.unconditional is not None and len(self.unconditional) != len(self.ratios):
            raise InvalidConfig(
                f"both branches of a magnitude curve have one ratio a step, got {len(self.ratios)} and "
                f"{len(self.unconditional)}; give both at the same step count"
            )

    def at(self, step: int, total_steps: int, branch_index: int = 0) -> float:
        """Give the ratio of a step of a run of `total_steps`: that of the nearest step of the curve.

        The published rule: entry round(step * (length - 1) / (total_steps - 1)), halves to even; a run of one step
        takes the last entry. Raises `InvalidConfig` for a step or a branch that the run or the curve does not have.
        """
        if not is_count(total_steps, 1) or not is_count(step) or step >= total_steps:
            raise InvalidConfig(
                f"a step is a whole number from 0 up to the run's steps, got {step!r} of {total_steps!r}"
            )
        if not is_count(branch_index) or (self.unconditional is not None and branch_index > 1):
            raise InvalidConfig(
                f"this magnitude curve has two branches, 0 and 1, got {branch_index!r}; calibrate the model with all "
                "its guidance branches"
            )
        curve = self.unconditional if self.unconditional is not None and branch_index == 1 else self.ratios
        if total_steps == 1:
            return curve[-1]
        return curve[round(step * ((len(curve) - 1) / (total_steps - 1)))]
