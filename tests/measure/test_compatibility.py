"""Every combination of accelerators runs and keeps its promises, or is refused by name with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from combinations import Names, combinations, tried
from fastdit import Stack

#: The forecasters are covered one by one by the contract; here the plain and an extrapolating one stand for them.
ROWS = list(combinations(("Reuse", "Taylor")))


@pytest.mark.parametrize(("names", "stack"), ROWS, ids=["-".join(filter(None, names)) for names, _ in ROWS])
def test_a_combination_runs_and_keeps_its_promises_or_is_refused_with_a_reason(
    names: Names, stack: Stack | str
) -> None:
    found = tried(names, stack)
    assert found.refusal is None or len(found.refusal) > 40


def test_what_is_refused_is_refused_for_the_effects_that_were_declared() -> None:
    refused: dict[Names, Any] = {names: stack for names, stack in ROWS if isinstance(stack, str)}
    for schedule, step_cache, _, option, token_cache in refused:
        curve_and_schedule = step_cache == "MagCache" and schedule != "none"
        same_rows = token_cache != "none" or "the query's frame" in schedule
        assert curve_and_schedule or (option == "per image" and same_rows)
    assert refused
