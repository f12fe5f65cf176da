"""Engines that the tests build are kept for this session alone."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def engines(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIT_CACHE", str(tmp_path_factory.mktemp("engines")))
        patch.setenv("FASTDIT_STATE", str(tmp_path_factory.mktemp("state")))
        yield
