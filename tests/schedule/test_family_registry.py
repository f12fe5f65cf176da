"""Families that somebody else describes: registered in a process, or named by an installed package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fastdit import InvalidConfig
from fastdit.models import Family, families, family, family_of, register_family
from fastdit.models.flux import FLUX
from fastdit.models.frames import FrameFamily


class OwnPipeline:
    """A pipeline of somebody else's."""


OWN = FrameFamily("Own", ("OwnPipeline",), patch=4)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays registered, and what is installed is looked up anew."""
    monkeypatch.setattr(family, "_REGISTERED", [])
    family._installed.cache_clear()
    yield
    family._installed.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> None:
    """Pretend that a package with an entry point is installed."""
    entry = SimpleNamespace(name="own", value="own_package:family", load=load)
    monkeypatch.setattr(family, "entry_points", lambda group: [entry] * (group == "fastdit.families"))


def test_a_registered_family_describes_its_pipelines_and_is_listed() -> None:
    assert family_of(OwnPipeline()) is None
    assert register_family(OWN) is OWN
    assert family_of(OwnPipeline()) is OWN and OWN in families()


def test_a_pipeline_that_is_described_already_is_refused_by_name() -> None:
    register_family(OWN)
    with pytest.raises(InvalidConfig, match=r"OwnPipeline belong to the family Own"):
        register_family(FrameFamily("Other", ("OwnPipeline",)))
    with pytest.raises(InvalidConfig, match=r"FluxPipeline belong to the family FLUX\.1"):
        register_family(FrameFamily("Other", ("FluxPipeline", "OtherPipeline")))
    assert [one.name for one in families()].count("Own") == 1


@pytest.mark.parametrize("given", [OWN, lambda: OWN], ids=["object", "factory"])
def test_an_installed_package_names_a_family_as_an_entry_point(
    monkeypatch: pytest.MonkeyPatch, given: Family | Callable[[], Family]
) -> None:
    installed(monkeypatch, lambda: given)
    assert family_of(OwnPipeline()) is OWN and families()[-1] is OWN


def test_a_package_that_can_t_be_imported_is_named_and_stands_in_no_other_s_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load() -> Family:
        raise ImportError("no module named own_package")

    installed(monkeypatch, load)
    flux = type("FluxPipeline", (), {})()
    assert family_of(flux) is FLUX
    with pytest.raises(InvalidConfig, match=r"'own' belongs to own_package:family, which can't be imported: no module"):
        family_of(OwnPipeline())
