"""A stack's JSON may name what an installed adapter registers; the adapter is imported then and not before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdit import InvalidConfig, Stack
from fastdit.config import _REGISTRY

MODULE = """
import dataclasses
from fastdit.config import register
from fastdit.step_cache.gates.interval import Interval

@register
@dataclasses.dataclass(frozen=True)
class FromAnAdapter(Interval):
    pass
"""
ENTRIES = """
[fastdit.accelerators]
FromAnAdapter = an_adapter:FromAnAdapter
Broken = an_adapter_of_what_is_missing:Broken
Other = an_adapter:Other
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lay out an adapter as pip would."""
    information = tmp_path / "an_adapter-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: an-adapter\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRIES)
    (tmp_path / "an_adapter.py").write_text(MODULE)
    (tmp_path / "an_adapter_of_what_is_missing.py").write_text("import what_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("an_adapter", None)
    _REGISTRY.pop("FromAnAdapter", None)


def stack_of(name: str) -> dict[str, object]:
    return {"fastdit_stack": 1, "accelerators": [{"type": name, "interval": 3}]}


@pytest.mark.usefixtures("installed")
def test_a_name_of_an_adapter_is_found_by_its_entry_point() -> None:
    assert "an_adapter" not in sys.modules
    stack = Stack.from_json(stack_of("FromAnAdapter"))
    assert type(stack[0]).__module__ == "an_adapter"
    assert Stack.from_json(stack.to_json()) == stack


@pytest.mark.usefixtures("installed")
def test_an_adapter_that_is_not_named_is_not_imported() -> None:
    with pytest.raises(InvalidConfig, match="unknown type 'Nobody'"):
        Stack.from_json(stack_of("Nobody"))
    assert "an_adapter" not in sys.modules


@pytest.mark.usefixtures("installed")
def test_an_adapter_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InvalidConfig, match="'Broken' belongs to an_adapter_of_what_is_missing:Broken"):
        Stack.from_json(stack_of("Broken"))


@pytest.mark.parametrize("name", ["os", "an_adapter:FromAnAdapter", "", None, 3, ["FromAnAdapter"]])
def test_what_is_no_name_of_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfig, match="unknown type"):
        Stack.from_json(stack_of(name))
