"""A pytest fixture that keeps the user's own folders out of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep engines and their secret in folders of the session, each engine built once; gives the engines' folder.

    Imported in a `conftest.py`, it acts in every test beside it.
    """
    engines = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIT_CACHE", str(engines))
        patch.setenv("FASTDIT_STATE", str(tmp_path_factory.mktemp("state")))
        yield engines
