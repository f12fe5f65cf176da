"""Mutants are small changes to code that runs, each made alone, and tried by the tests that reach them."""

from __future__ import annotations

import ast

import pytest

import mutation

TEXT = '''
"""A module."""
from a import b

LIMIT = 3

def bounded(value: int = 1) -> int | None:
    """Texts stay."""
    if value < 0:
        raise ValueError(f"{value + 1} is too small")
    seen.append(value)
    return -value if value and LIMIT else value * 2
'''


def test_every_kind_of_change_is_offered_once_and_texts_and_types_are_left_alone() -> None:
    offered = [(change.function, change.what) for change in mutation.changes(ast.parse(TEXT))]
    assert offered == [
        (None, "3 -> 4"),
        ("bounded", "seen.append(value) -> pass"),
        ("bounded", "1 -> 2"),
        ("bounded", "if value < 0 -> if not value < 0"),
        ("bounded", "raise ValueError(f'{value + 1} is too small') -> pass"),
        ("bounded", "value < 0 -> value <= 0"),
        ("bounded", "0 -> 1"),
        ("bounded", "return -value if value and LIMIT else value * 2 -> return None"),
        ("bounded", "if value and LIMIT -> if not (value and LIMIT)"),
        ("bounded", "value and LIMIT -> value or LIMIT"),
        ("bounded", "-value -> +value"),
        ("bounded", "value * 2 -> value / 2"),
        ("bounded", "2 -> 3"),
    ]


@pytest.mark.parametrize("module", mutation.TARGETS)
def test_each_change_of_a_module_gives_another_one_that_compiles(module: str) -> None:
    before = ast.unparse(mutation.parsed(module))
    for index in range(0, len(mutation.changes(mutation.parsed(module))), 7):
        tree = mutation.parsed(module)
        mutation.changes(tree)[index].make()
        assert ast.unparse(tree) != before
        compile(ast.fix_missing_locations(tree), module, "exec")


def test_a_mutant_is_tried_by_its_module_s_tests_that_reach_it_the_quickest_first() -> None:
    own, other = "tests/step_cache/test_gates.py", "tests/schedule/test_ralu.py"
    tests = {
        f"{own}::slow": (2.0, ["step_cache.policy:a"]),
        f"{own}::quick": (1.0, ["step_cache.policy:a"]),
        f"{own}::elsewhere": (0.1, ["step_cache.policy:b"]),
        f"{other}::foreign": (0.1, ["step_cache.policy:a"]),
    }
    chosen = mutation.own_tests("step_cache.policy", "a", tests, 9.0)
    assert chosen == [f"{own}::quick", f"{own}::slow"]
    assert mutation.own_tests("step_cache.policy", "a", tests, 1.5) == chosen[:1]
    assert len(mutation.own_tests("step_cache.policy", None, tests, 9.0)) == 3


def endless() -> int:
    while True:
        pass


def test_what_is_found_of_a_module_takes_the_place_of_what_was_known_and_all_is_added_up() -> None:
    known = {
        "modules": {"a": {"verdicts": {"killed": 1}}, "b": {"verdicts": {"killed": 2, "untested": 1}}},
        "left": [{"module": "a", "line": 1}, {"module": "b", "line": 2}],
    }
    found = {"modules": {"a": {"verdicts": {"timeout": 1, "survived": 1}}}, "left": [{"module": "a", "line": 3}]}
    result = mutation.joined(known, found)
    assert (result["mutants"], result["killed"]) == (5, 3 / 5)
    assert [mutant["line"] for mutant in result["left"]] == [2, 3]


def test_a_process_that_does_not_come_to_an_end_is_ended() -> None:
    assert mutation.in_a_fork(lambda: 1, 60.0) == 1
    assert mutation.in_a_fork(endless, 0.2) is None
