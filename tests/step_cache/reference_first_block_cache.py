"""First-block cache in a straight line, for one branch of FLUX.

h = block_0(x), f = h - x
mean|f - f_c| / mean|f_c| < threshold:   y = h + R         f_c, R: of the last step that ran all blocks
else:                                    run the rest, f_c = f, R = y - h
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import FluxTransformer2DModel
from reference_flux import Embedded, first_block, run_blocks
from torch import Tensor


@dataclass
class FirstBlockReference:
    """The state of one branch of one run."""

    threshold: float
    steps: int
    first: int = 1
    last: int = 0
    compared: Tensor | None = None
    residual: Tensor | None = None

    def __call__(self, model: FluxTransformer2DModel, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        text, image = first_block(model, at)
        change = image - at.image
        distance = float("inf")
        if self.compared is not None:
            distance = float((change - self.compared).abs().mean() / self.compared.abs().mean())
        forced = step < self.first or step >= self.steps - self.last
        if not forced and self.residual is not None and distance < self.threshold:
            return image + self.residual, False, distance
        after = run_blocks(model, at, image, text, 1)[-1]
        self.compared, self.residual = change, after - image
        return after, True, distance
