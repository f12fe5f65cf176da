"""TeaCache (arXiv 2411.19108) in a straight line, for one branch of FLUX.

d_t = mean|m_t - m_{t-1}| / mean|m_{t-1}|     m: the first block's modulated input, of the step before, run or not
acc += P(d_t)                                 P: degree four, highest power first
first step, last step or acc >= threshold:    run the blocks, keep y - x, acc = 0
else:                                         y = x + what was kept
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusers import FluxTransformer2DModel
from reference_flux import Embedded, first_signal, run_blocks
from torch import Tensor


@dataclass
class TeaCacheReference:
    """The state of one branch of one run."""

    threshold: float
    coefficients: tuple[float, ...]
    steps: int
    first: int = 1
    last: int = 1
    max_consecutive: int | None = None
    previous: Tensor | None = None
    residual: Tensor | None = None
    accumulated: float = 0.0
    skipped_in_a_row: int = 0
    distances: list[float] = field(default_factory=list)

    def __call__(self, model: FluxTransformer2DModel, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        signal = first_signal(model, at)
        if self.previous is not None:
            distance = float((signal - self.previous).abs().mean() / self.previous.abs().mean())
            self.distances.append(distance)
            value = 0.0
            for coefficient in self.coefficients:
                value = value * distance + coefficient
            self.accumulated += value
        self.previous = signal
        forced = step < self.first or step >= self.steps - self.last
        if self.max_consecutive is not None and self.skipped_in_a_row >= self.max_consecutive:
            forced = True
        decided_on = self.accumulated
        if forced or self.residual is None or self.accumulated >= self.threshold:
            image = run_blocks(model, at, at.image, at.text, 0)[-1]
            self.residual = image - at.image
            self.accumulated, self.skipped_in_a_row = 0.0, 0
            return image, True, decided_on
        self.skipped_in_a_row += 1
        return at.image + self.residual, False, decided_on
