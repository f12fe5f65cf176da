"""What every test shares: one torch thread, seeded randomness, no gradients, quiet pipelines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The references and helpers of one room are used in another.
sys.path.extend(str(Path(__file__).parent / room) for room in ("schedule", "step_cache", "token_cache", "core"))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fastdit", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastdit")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; these come out of released versions of the libraries, not out of ours."""
    # diffusers' DPM solver hands a tensor to numpy 2 in a way that torch does not know yet.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )
    # peft tells that a second LoRA is the second one.
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config` attribute:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and a busy machine loses much by them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from one global seed; nothing may depend on it, but a failure must repeat."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For tests with a loop of their own; the pipelines switch gradients off themselves."""
    with torch.no_grad():
        yield


@pytest.fixture
def generators() -> Callable[..., Any]:
    """Fresh generators: `generators(3)` is one, `generators(3, 4)` a list of two."""

    def make(*seeds: int) -> Any:
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made[0] if len(made) == 1 else made

    return make
