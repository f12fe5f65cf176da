"""Warm replicas: mixed sizes compile nothing, others are refused or built, and what is said without Ray."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdit import Compile, InvalidConfig, Stack, accelerate
from fastdit.testing import flux_transformer, tiny_flux
from fastdit_ray import Asked, Pictures, Served, SizeNotWarmed, Trace, application, trace

SIZES = ((64, 64), (64, 96), (96, 96))
STEPS = 2

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None or find_spec("starlette") is None,
    reason="Ray Serve is not installed (pip install 'ray[serve]')",
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Compile needs a C++ compiler on a CPU")


def load() -> Any:
    """Make a FLUX of one double and one single block."""
    pipeline, _ = tiny_flux(steps=STEPS)
    pipeline.transformer = flux_transformer(layers=1, single_layers=1)
    return pipeline


def served(stack: Stack, sizes: Any = SIZES, **changes: Any) -> Served:
    _, call = tiny_flux(steps=STEPS)
    given = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds", "num_inference_steps")}
    return Served(load, stack, sizes, call=given, **changes)


def mixed(count: int) -> list[Asked]:
    chosen = random.Random(0)
    return [Asked(*chosen.choice(SIZES), seed=number) for number in range(count)]


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return Pictures(served(Stack()))


def test_a_picture_is_the_twins_own(pictures: Pictures) -> None:
    asked = Asked(64, 96, seed=5)
    twin = accelerate(load(), Stack())
    call = {**pictures.served.call, "height": 64, "width": 96}
    own = twin(**call, generator=torch.Generator().manual_seed(5), output_type="pil").images[0]
    assert np.array_equal(np.asarray(pictures.make(asked)), np.asarray(own))


def test_a_size_that_is_not_warm_is_refused_by_name(pictures: Pictures) -> None:
    with pytest.raises(SizeNotWarmed, match=r"for 128 x 64 px; .* 64 x 64, 64 x 96, 96 x 96.*others=\"build\""):
        pictures.make(Asked(128, 64))


@pytest.mark.parametrize(
    ("sizes", "others", "told"),
    [((), "refuse", "at least one"), (((64,),), "refuse", "pairs"), (SIZES, "wait", '"refuse" or "build"')],
)
def test_what_can_t_be_served_is_refused_when_it_is_said(sizes: Any, others: Any, told: str) -> None:
    with pytest.raises(InvalidConfig, match=told):
        served(Stack(), sizes, others=others)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(InvalidConfig, match=r"pip install 'ray\[serve\]'"):
        application(served(Stack()))


def test_percentiles_are_those_of_all_requests_and_of_a_size() -> None:
    asked = tuple(Asked(64, 64) if number % 2 else Asked(96, 96) for number in range(200))
    found = Trace(asked, tuple(float(number) for number in range(200)), 0)
    assert found.percentile(50) == pytest.approx(99.5) and found.percentile(95) == pytest.approx(189.05)
    assert found.percentile(50, (64, 64)) == pytest.approx(100.0)
    assert "200 requests: P50 99.500 s" in str(found) and "0 compilations" in str(found)


@needs_compiler
def test_other_sizes_are_built_where_that_is_asked_for_and_counted() -> None:
    made = Pictures(served(Stack([Compile()]), SIZES[:1], others="build"))
    made.make(Asked(64, 64))
    assert made.compilations == 0
    made.make(Asked(64, 96))
    assert made.compilations == 2 and (64, 96) in made.warm  # a double block and a single one
    made.make(Asked(64, 96))
    assert made.compilations == 2


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    """The deployment on a Ray of this machine, its engines compiled for three sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Its processes import what loads the pipeline from this file.
        patch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), *sys.path)))
        import ray
        from ray import serve

        # What Ray leaves for the collector to close is none of the tests'.
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            serve.start(http_options={"port": 0})
            yield serve.run(application(served(Stack([Compile()])), ray_actor_options={"num_cpus": 1}))
        finally:
            serve.shutdown()
            ray.shutdown()


@needs_ray
@needs_compiler
def test_200_requests_of_mixed_sizes_compile_nothing_after_the_warm_up(handle: Any) -> None:
    found = trace(handle, mixed(200), at_once=2)
    print(found)
    assert found.compilations == 0 and len(found.seconds) == 200
    assert 0 < found.percentile(50) <= found.percentile(95)
    assert {asked.size for asked in found.asked} == set(SIZES)


@needs_ray
@needs_compiler
def test_a_handle_raises_the_named_error_of_a_size_that_is_not_warm(handle: Any) -> None:
    with pytest.raises(SizeNotWarmed, match="the sizes that are served are"):
        handle.picture.remote(Asked(128, 128)).result()
