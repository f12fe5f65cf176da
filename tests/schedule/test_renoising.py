"""Monte Carlo: after each switch the latents follow the flow's own marginal, seen from outside, through the pipeline.

The transformer's output layer is set to zero, so a step moves nothing; a callback puts exact draws of x_e given the
clean latents x_1 (mean e * x_1, deviation 1 - e) before the last step of a stage, and reads what the switch made of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fastdit import RALU, accelerate

ENDS = (0.3, 0.45)
CLEAN = 0.7
SIDE = 512
COARSE = (SIDE // 32) ** 2
RATIO = 0.25
REFINED = int(RATIO * COARSE)


@dataclass
class Switches:
    """The latents right after 1 -> 2 and right after 2 -> 3."""

    mixed: Tensor
    fine: Tensor


def switches(restart: float, fidelity: str) -> Switches:
    pipe, call = tiny.flux(size=SIDE, vae="tiny", batch=8, steps=5)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()
        pipe.transformer.proj_out.bias.zero_()
    fast = accelerate(pipe, [RALU(steps=(2, 2, 1), ends=ENDS, ratio=RATIO, restart=restart, fidelity=fidelity)])
    seen: dict[int, Tensor] = {}

    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        seen[step] = latents
        if step not in (0, 2):
            return {}
        end = ENDS[0] if step == 0 else ENDS[1]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(50 + step))
        return {"latents": end * CLEAN + (1.0 - end) * noise}

    tiny.run(fast, call, output_type="latent", callback_on_step_end=callback)
    return Switches(seen[1], seen[3])


def start(end: float, restart: float) -> float:
    return end / (restart * (1.0 - end) + end)


@pytest.fixture(scope="module", params=[("exact", 2.5), ("paper", 2.5), ("exact", 6.317)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, float, Switches]:
    fidelity, restart = request.param
    return fidelity, restart, switches(restart, fidelity)


def moments(group: Tensor, time: float) -> tuple[float, float]:
    """(bias of the mean, variance as a multiple of the flow's) of tokens at a time."""
    deviation = group - time * CLEAN
    return float(deviation.mean()), float(deviation.square().mean()) / (1.0 - time) ** 2


def tolerance(group: Tensor) -> float:
    """Four standard errors of a variance ratio."""
    return 4.0 * (2.0 / group.numel()) ** 0.5


def test_tokens_kept_at_the_first_switch_follow_the_flow_or_the_papers_known_excess(case: Any) -> None:
    fidelity, restart, found = case
    kept = found.mixed[:, : COARSE - REFINED]
    time = start(ENDS[0], restart)
    bias, variance = moments(kept, time)
    expected = 1.0 if fidelity == "exact" else 1.0 + 1.0 / restart**2
    assert abs(bias) < tolerance(kept)
    assert variance == pytest.approx(expected, abs=tolerance(kept))


def test_copied_tokens_have_the_flows_mean_and_are_independent_within_a_group(case: Any) -> None:
    _, restart, found = case
    children = found.mixed[:, COARSE - REFINED :]
    time = start(ENDS[0], restart)
    bias, _ = moments(children, time)
    groups = (children - time * CLEAN).reshape(8, REFINED, 4, -1).transpose(2, 3).reshape(-1, 4)
    covariance = groups.T @ groups / groups.shape[0] / (1.0 - time) ** 2
    assert abs(bias) < tolerance(children)
    assert torch.allclose(covariance, torch.eye(4), atol=2.0 * tolerance(children))


def test_after_the_second_switch_every_group_of_four_follows_the_flow(case: Any) -> None:
    fidelity, restart, found = case
    time = start(ENDS[1], restart)
    side = SIDE // 16
    bias, variance = moments(found.fine, time)
    # Under "paper" the tokens that already were fine have the excess; they are RATIO of all.
    expected = 1.0 if fidelity == "exact" else 1.0 + RATIO / restart**2
    assert found.fine.shape[1] == side * side
    assert abs(bias) < tolerance(found.fine)
    assert variance == pytest.approx(expected, abs=tolerance(found.fine))
    grid = (found.fine - time * CLEAN).reshape(8, side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 5, 2, 4)
    groups = grid.reshape(-1, 4)
    covariance = groups.T @ groups / groups.shape[0] / (1.0 - time) ** 2
    off_diagonal = covariance - torch.diag(covariance.diag())
    assert float(off_diagonal.abs().max()) < 2.0 * tolerance(found.fine)


def test_the_noise_of_the_two_switches_is_fresh_and_differs_between_images(case: Any) -> None:
    _, restart, found = case
    time = start(ENDS[0], restart)
    images = (found.mixed - time * CLEAN).flatten(1)
    correlation = torch.corrcoef(images) - torch.eye(8)
    assert float(correlation.abs().max()) < 4.0 / images.shape[1] ** 0.5
