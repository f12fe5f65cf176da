"""What a gate asked of the first block's norm is not asked again when the block runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tiny
from fastdit import IncompatibleStack, TeaCache, accelerate

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::fastdit.NeverFired")]

NEVER = TeaCache(1e-9, coefficients=(1.0, 0.0))
STEPS = 4


class Norm(nn.Module):
    """A block's norm that counts its calls and may give what a block then writes into."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.given = inner, 0, torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output = self.inner(*args, **kwargs)
        self.given = output[0]
        return output


def counting(pipe: Any) -> Norm:
    block = pipe.transformer.transformer_blocks[0]
    block.norm1 = Norm(block.norm1)
    return block.norm1


def test_the_norm_runs_once_a_step_and_the_latents_are_the_plain_ones() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    norm = counting(pipe)
    plain = tiny.run(pipe, call, output_type="latent")
    per_run, norm.calls = norm.calls, 0
    fast = accelerate(pipe, [NEVER])
    # The first forward of a kind is observed: it has run before the signal is asked for.
    assert torch.equal(tiny.run(fast, call, output_type="latent"), plain)
    assert norm.calls == per_run + 1
    norm.calls = 0
    assert torch.equal(tiny.run(fast, call, output_type="latent"), plain)
    assert norm.calls == per_run == STEPS


def test_a_block_with_hooks_of_its_own_runs_as_it_is() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    block, seen = pipe.transformer.transformer_blocks[0], []
    norm = counting(pipe)
    fast = accelerate(pipe, [NEVER])
    tiny.run(fast, call)
    norm.calls = 0
    block.register_forward_hook(lambda module, args, output: seen.append(module))
    tiny.run(fast, call)
    assert seen == [block] * STEPS
    assert norm.calls == 2 * STEPS


def test_a_norm_called_with_other_arguments_runs_again() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    block = pipe.transformer.transformer_blocks[0]

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states.clone(), **kwargs)

    norm = counting(pipe)
    block.__class__ = Other
    plain = tiny.run(pipe, call, output_type="latent")
    fast = accelerate(pipe, [NEVER])
    tiny.run(fast, call)
    norm.calls = 0
    assert torch.equal(tiny.run(fast, call, output_type="latent"), plain)
    assert norm.calls == 2 * STEPS


def test_a_block_that_writes_into_its_norms_output_is_refused_by_name() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    block = pipe.transformer.transformer_blocks[0]

    class Writes(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            self.norm1.given.mul_(2.0)
            return output

    counting(pipe)
    block.__class__ = Writes
    fast = accelerate(pipe, [NEVER])
    with pytest.raises(IncompatibleStack, match="norm1"):
        tiny.run(fast, call)


def test_tensors_of_inference_mode_are_computed_anew() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    norm = counting(pipe)
    fast = accelerate(pipe, [NEVER])
    tiny.run(fast, call)
    norm.calls = 0
    with torch.inference_mode():
        tiny.run(fast, call)
    assert norm.calls == 2 * STEPS
