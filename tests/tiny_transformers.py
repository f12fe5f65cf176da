"""The tiny transformers, skipping a test where the installed diffusers lacks the class."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from fastdit import UnsupportedModel
from fastdit.testing import tiny_transformers
from fastdit.testing.tiny_transformers import Built


def _or_skip(builder: Callable[..., Built]) -> Callable[..., Built]:
    @functools.wraps(builder)
    def build() -> Built:
        try:
            return builder()
        except UnsupportedModel as error:
            pytest.skip(str(error))

    return build


TRANSFORMERS = {name: _or_skip(builder) for name, builder in tiny_transformers.TRANSFORMERS.items()}
lumina2 = TRANSFORMERS["lumina2"]
