"""RALU and a step cache together, against both straight-line references put together."""

from __future__ import annotations

from typing import Any

import pytest
import reference_ralu
import torch
from reference_first_block_cache import FirstBlockReference
from reference_flux import embed, head
from reference_teacache import TeaCacheReference
from torch import Tensor

import tiny
from fastdit import (
    RALU,
    FirstBlockCache,
    SkipPolicy,
    TeaCache,
    accelerate,
)

pytestmark = pytest.mark.usefixtures("no_grad")

IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
STEPS = (5, 6, 7)
TOTAL = sum(STEPS)
STARTS = (0, 5, 11)
CACHES = {
    "teacache": (
        TeaCache(0.6, coefficients=IDENTITY),
        lambda: TeaCacheReference(0.6, IDENTITY, TOTAL),
    ),
    "first block": (
        FirstBlockCache(0.8, policy=SkipPolicy(first=1, last=0)),
        lambda: FirstBlockReference(0.8, TOTAL),
    ),
}


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
@pytest.mark.parametrize("cache", CACHES)
def test_both_together_equal_both_references_together(cache: str, size: tuple[int, int]) -> None:
    accelerator, reference = CACHES[cache]
    pipe, call = tiny.flux(size=size, steps=TOTAL)
    fast = accelerate(pipe, [RALU.paper("4x", fidelity="exact"), accelerator])
    plan = fast.fastdit.plan(*size, TOTAL)
    computed: list[bool] = []
    state: Any = None

    def forward(
        *,
        image: int,
        step: int,
        hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
    ) -> Tensor:
        nonlocal state
        if step in STARTS:  # what was kept in the stage before is void
            state = reference()
        at = embed(
            pipe.transformer,
            hidden_states,
            timestep,
            guidance,
            pooled_projections,
            encoder_hidden_states,
            txt_ids,
            img_ids,
        )
        stream, ran, _ = state(pipe.transformer, at, step)
        computed.append(ran)
        return head(pipe.transformer, at, stream)

    for seed in range(40):
        computed.clear()
        try:
            expected = reference_ralu.ralu(
                pipe.transformer,
                pipe.vae,
                sigmas=[list(stage.sigmas) for stage in plan.stages],
                ends=(0.3, 0.45),
                z=6.317,
                ratio=0.3,
                fidelity="exact",
                generator=torch.Generator().manual_seed(seed),
                forward=forward,
                **reference_ralu.flux_arguments(call),
            )
        except ValueError:
            continue
        break
    found = tiny.run(fast, call, seed=seed, output_type="latent")
    record = fast.fastdit.last_run
    assert [step.action == "computed" for step in record.steps] == computed
    assert 3 < sum(computed) < TOTAL
    torch.testing.assert_close(found, expected.latents, rtol=1e-3, atol=1e-3)
