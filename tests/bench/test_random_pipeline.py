"""Pipelines of published architectures with random weights: their names, their prompts, always the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdit import InvalidConfig, Source, accelerate
from fastdit.bench.grammar import parse_stack

SMALLEST = "random:flux-schnell@0.0001"


@pytest.fixture(scope="module")
def pipeline() -> object:
    return Source(SMALLEST, dtype="float32").load()


@pytest.mark.parametrize("name", ["random:", "random:flax-dev", "random:flux-dev@0", "random:flux-dev@2", "random:x@y"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfig, match="random pipelines are"):
        Source(name)


def test_prompts_differ_and_a_stack_acts(pipeline: object) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "np", "max_sequence_length": 16}
    twin = accelerate(pipeline, parse_stack("Interval 2"))

    def made(prompt: str, pipe: object) -> np.ndarray:
        images: np.ndarray = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **call).images  # type: ignore[operator]
        return images

    one, again, other = (made(prompt, twin) for prompt in ("a cat", "a cat", "a boat"))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and np.isfinite(one).all()
    assert twin.fastdit.last_run.skipped > 0  # type: ignore[attr-defined]


def test_it_is_always_the_same_and_leaves_the_random_numbers_alone(pipeline: object) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = Source(SMALLEST, dtype="float32").load()
    assert torch.equal(torch.rand(1), expected)
    first, second = (next(one.transformer.parameters()) for one in (pipeline, again))  # type: ignore[attr-defined]
    assert torch.equal(first, second)
