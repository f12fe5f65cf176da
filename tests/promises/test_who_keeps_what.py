"""The table of promises tells kept, broken and not asked apart, and the soak finds a result that is not repeated."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

import promises
import soak
from fastdit.testing import PROMISES


def test_a_table_gives_every_reason_once() -> None:
    seen = (True, ""), (False, "it differs"), (None, "no record"), (False, "it differs")
    answers = {name: {"kept": kept, "seen": why} for name, (kept, why) in zip("abcd", seen, strict=True)}
    text = promises.table({"acts": answers, "finite": answers})
    assert f"| **acts**: {PROMISES['acts'].says} | yes | no (1) | - (2) | no (1) |" in text
    assert text.endswith("1. it differs\n2. no record")


def test_a_broken_check_says_what_was_seen() -> None:
    with pytest.raises(AssertionError) as broken:
        assert [] == [1]
    assert promises._seen(broken.value).startswith("assert [] == [1]")
    assert promises._seen(TypeError("two\nlines")) == "TypeError: two"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_broken_off_in_every_way_leave_every_repeat_equal() -> None:
    soaked = soak.Soak(seed=1)
    for _ in range(40):
        soaked.step()
    assert soaked.counts["repeats"] > 0
    assert set(soak.FAULTS) & set(soaked.counts)
    assert soaked.unequal == []


def test_a_result_that_is_not_repeated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()

    def drifting(*_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([float(next(numbers))])

    monkeypatch.setattr(soak, "generate", drifting)
    soaked = soak.Soak(seed=1)
    soaked.table = soaked.table[:1]
    for _ in range(20):
        soaked.step()
    assert soaked.unequal
