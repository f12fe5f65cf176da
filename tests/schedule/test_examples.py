"""The examples in the docstrings of schedules, lifts, selectors and layouts hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastdit.schedule

MODULES = [module.name for module in pkgutil.walk_packages(fastdit.schedule.__path__, "fastdit.schedule.")]


@pytest.mark.parametrize("name", MODULES)
def test_an_example_in_a_docstring_gives_what_it_says(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), verbose=False).failed == 0
