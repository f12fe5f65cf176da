"""The promises that every accelerator keeps, as a test class: one subclass a method, for our tests and for adapters'.

    class TestMine(AcceleratorContract):
        accelerator = Mine(strength=2)     # one that does something in 12 steps of `tiny_flux`
        neutral = Mine(strength=0)         # one that must change nothing, or None

The pipelines are thousands of times smaller than a user's and made of the real diffusers classes with seeded weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from fastdit.accelerator import Accelerator
from fastdit.testing.models import tiny_flux
from fastdit.testing.promises import PROMISES, Inapplicable, Promise, Subject, of_accelerator
from fastdit.testing.tiny import Built


class AcceleratorContract:
    """What every accelerator promises. Subclass it with an accelerator that acts within 12 steps of `tiny_flux`.

    There is a test for each of `PROMISES`. `reads_signal` says that a signal decides, so that one which is not finite
    must be noticed.
    """

    accelerator: ClassVar[Accelerator]
    neutral: ClassVar[Accelerator | None] = None
    reads_signal: ClassVar[bool] = False

    def pipeline(self, **options: int) -> Built:
        """Make the pipeline and the arguments of a call."""
        return tiny_flux(**options)

    def subject(self) -> Subject:
        """Give what the promises are asked of."""
        return of_accelerator(self.accelerator, self.neutral, reads_signal=self.reads_signal, build=self.pipeline)


def _test(promise: Promise) -> Callable[[AcceleratorContract], None]:
    def test(self: AcceleratorContract) -> None:
        with suppress(Inapplicable):
            promise.check(self.subject())

    test.__doc__ = promise.says
    return test


for _name, _promise in PROMISES.items():
    setattr(AcceleratorContract, f"test_{_name.replace(' ', '_')}", _test(_promise))
