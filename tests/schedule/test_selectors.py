"""Selectors: their scores against references in NumPy, and the runs in which they choose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fastdit import (
    RALU,
    Edges,
    InvalidConfig,
    LatentLift,
    LatentVariance,
    PixelGradient,
    Stack,
    TextAttention,
    VelocityVariance,
    accelerate,
)
from fastdit.models.flux import FLUX
from fastdit.models.patches import patches
from fastdit.schedule.selectors.base import Scene, Selector

pytestmark = pytest.mark.usefixtures("no_grad")

SHORT = {"steps": (3, 2, 2), "ends": (0.3, 0.45), "ratio": 0.3}
ROWS, COLUMNS = 4, 6


def scene(batch: int = 2, **options: Any) -> Scene:
    pipe, _ = tiny.flux()
    clean = patches(tiny.randn(batch, 4, 2 * ROWS, 2 * COLUMNS, seed=3))
    return Scene(FLUX, pipe, ROWS, COLUMNS, clean, **options)


def test_a_pixel_gradient_is_the_mean_length_of_central_differences() -> None:
    given = scene()
    pixels = given.decoded().numpy().astype(np.float64)
    grey = np.tensordot([0.299, 0.587, 0.114], pixels, axes=(0, 1))
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across, down = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    length = np.sqrt(across**2 + down**2) / 2
    height, width = length.shape[1] // ROWS, length.shape[2] // COLUMNS
    expected = length.reshape(2, ROWS, height, COLUMNS, width).mean(axis=(2, 4)).reshape(2, -1)
    np.testing.assert_allclose(PixelGradient().scores(given).numpy(), expected, rtol=1e-4)


def test_a_latent_s_variance_is_that_of_the_token_and_those_around_it() -> None:
    given = scene()
    grid = given.clean.numpy().astype(np.float64).reshape(2, ROWS, COLUMNS, -1)
    expected = np.empty((2, ROWS, COLUMNS))
    for row in range(ROWS):
        for column in range(COLUMNS):
            around = grid[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected[:, row, column] = around.reshape(2, -1, grid.shape[3]).var(axis=1).mean(axis=1)
    np.testing.assert_allclose(LatentVariance().scores(given).numpy(), expected.reshape(2, -1), rtol=1e-4)


def test_a_velocity_s_variance_is_that_over_the_steps_of_the_coarse_stage() -> None:
    velocities = [tiny.randn(2, ROWS * COLUMNS, 16, seed=seed) for seed in range(4)]
    found = VelocityVariance("turning").scores(scene(velocities=velocities))
    expected = np.stack([velocity.numpy() for velocity in velocities]).var(axis=0, ddof=1).mean(axis=-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert torch.equal(VelocityVariance().scores(scene(velocities=velocities)), -found)


@pytest.mark.parametrize(
    "selector", [Edges(), PixelGradient(), LatentVariance(), VelocityVariance(), TextAttention()], ids=str
)
def test_every_image_chooses_for_itself_and_a_run_is_repeated(selector: Selector, generators: Any) -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=7)
    fast = accelerate(pipe, [RALU(**SHORT, selector=selector)])
    together = tiny.run(fast, call, generator=generators(1, 2))
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16] * 3 + [28] * 2 + [64] * 2
    assert torch.equal(tiny.run(fast, call, generator=generators(1, 2)), together)
    for image in (0, 1):
        own = {name: value[image : image + 1] if torch.is_tensor(value) else value for name, value in call.items()}
        alone = tiny.run(fast, own, generator=generators(image + 1))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-4)


def test_the_velocities_that_a_run_chooses_by_are_those_of_its_coarse_steps() -> None:
    pipe, call = tiny.flux(size=128, steps=7)
    seen: list[Scene] = []

    class Watching(VelocityVariance):
        def scores(self, scene: Scene) -> torch.Tensor:
            seen.append(scene)
            return super().scores(scene)

    tiny.run(accelerate(pipe, [RALU(**SHORT, selector=Watching())]), call)
    assert [tuple(velocity.shape) for velocity in seen[0].velocities] == 3 * [(1, 16, 16)]
    assert not torch.equal(seen[0].velocities[0], seen[0].velocities[1])


def test_what_a_selector_can_t_do_is_refused_before_anything_runs() -> None:
    with pytest.raises(InvalidConfig, match="a Selector"):
        RALU(**SHORT, selector="edges")
    with pytest.raises(InvalidConfig, match="two or more"):
        RALU(**{**SHORT, "steps": (1, 2, 2)}, selector=VelocityVariance()).plan(8, 8, None)
    with pytest.raises(InvalidConfig, match="settled"):
        VelocityVariance("fast")
    with pytest.raises(InvalidConfig, match="higher strength"):
        VelocityVariance().scores(scene())


def test_a_stack_with_a_selector_survives_json() -> None:
    stack = Stack([RALU(**SHORT, selector=VelocityVariance(), lift=LatentLift())])
    assert Stack.from_json(stack.to_json()) == stack
