"""MagCache's magnitude curves: how much the block stack's residual grows from one step to the next (2506.09045).

The authors publish each curve from the second step on and put 1.0 in front of it, for the first step, which has
none before it. Here the curves are whole: the first entry is that 1.0, and there are as many entries as steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastdit.config import is_count, is_number, register
from fastdit.errors import InvalidConfig
from fastdit.step_cache import published

_TABLE = "magnitudes.json"


@register
@dataclasses.dataclass(frozen=True)
class MagnitudeCurve:
    """The ratio of each step's mean residual norm to the last step's, over a whole run.

    `unconditional` is the second guidance branch's curve; None where all branches share `ratios`.
    """

    ratios: tuple[float, ...]
    unconditional: tuple[float, ...] | None = None
    provenance: str = "given by the user"

    def __post_init__(self) -> None:
        for name in ("ratios", "unconditional"):
            values = getattr(self, name)
            if values is None and name == "unconditional":
                continue
            if not isinstance(values, (tuple, list)) or not values:
                raise InvalidConfig(f"a magnitude curve's {name} are one ratio a step, at least one, got {values!r}")
            if not all(is_number(value) and value > 0.0 for value in values):
                raise InvalidConfig(f"a magnitude curve's {name} are finite numbers above 0, got {values!r}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
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

    def save(self, path: str | Path) -> None:
        """Write the curve with its provenance as JSON."""
        published.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> MagnitudeCurve:
        """Read what `save` wrote. Raises `InvalidConfig` for anything else."""
        return cls(**published.load(cls, path, "a magnitude curve", {}))


def named(name: str) -> MagnitudeCurve:
    """Get a published curve by its name. Raises `InvalidConfig` for an unknown one."""
    entry = published.entry(_TABLE, name, "magnitude curves")
    return MagnitudeCurve(entry["ratios"], entry["unconditional"], entry["provenance"])


def for_model(transformer: Any) -> MagnitudeCurve:
    """Find the curve that was measured on this very model, by the name it was loaded under.

    Raises `InvalidConfig` where there is none: another model's curve is never used unasked.
    """
    source = published.source_of(transformer)
    name = published.name_for(_TABLE, source)
    if name is not None:
        return named(name)
    raise InvalidConfig(
        f"there is no magnitude curve for {type(transformer).__name__} loaded as {source or 'an unnamed model'}; "
        "measure one with fastdit.measure.calibration.calibrate_magcache(pipe, prompts), which gives a MagnitudeCurve, "
        "or take a published one with fastdit.step_cache.curves.named(...) "
        f"({', '.join(published.entries(_TABLE))}) if this model is a fine-tune of that one"
    )
