"""A configuration's annotations are its checks: what they allow, what they refuse and how that is said."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import pytest

import fastdit
from fastdit import InvalidConfig, Reuse, Stack, TaylorSeer, config
from fastdit.config import Config, Count, Range, Share, decode, encode
from fastdit.step_cache.base import StepCache
from fastdit.token_cache.base import TokenCache


@dataclasses.dataclass(frozen=True)
class Wide(Config):
    share: Share = 0.5
    count: Count | None = None
    _: dataclasses.KW_ONLY
    pair: tuple[float, float] = (0.0, 1.0)
    flags: Annotated[tuple[bool, ...], Range(at_least=1)] = (True,)
    mode: Literal["fast", "exact"] = "fast"
    switch: bool = False
    forecast: Reuse = dataclasses.field(default_factory=Reuse)


@dataclasses.dataclass(frozen=True)
class Narrow(Wide):
    share: float = 0.25
    mode: Literal["exact", "other"] = "exact"


@pytest.mark.parametrize(
    ("field", "right", "wrong", "said"),
    [
        ("share", [0, 1, 0.3], [-0.1, 1.1, math.nan, math.inf, True, "0.5", None], "a finite number >= 0 and <= 1"),
        ("count", [None, 1, 10**6], [0, 1.0, True, "1"], "a whole number >= 1 or None"),
        ("pair", [(0.5, 2)], [(1.0,), 1.0, (0.0, "1"), (0.0, 1.0, 2.0)], r"a sequence \(a finite number, a finite"),
        ("flags", [(False, True)], [(), (1,), True], r"a sequence \(True or False, ...\) of length >= 1"),
        ("mode", ["exact"], ["slow", None, 1], "one of 'fast', 'exact'"),
        ("switch", [True], [1, None], "True or False"),
        ("forecast", [Reuse()], [Reuse, None, 3], "a Reuse"),
    ],
)
def test_a_field_takes_what_its_annotation_allows_and_refuses_all_else_by_name(
    field: str, right: list[Any], wrong: list[Any], said: str
) -> None:
    for value in right:
        assert getattr(Wide(**{field: value}), field) == value
    for value in wrong:
        with pytest.raises(InvalidConfig, match=f"Wide's {field} is {said}.*, got "):
            Wide(**{field: value})


def test_a_list_is_kept_as_a_tuple_so_that_a_configuration_can_be_a_key() -> None:
    assert Wide(pair=[0.2, 0.4]) == Wide(pair=(0.2, 0.4))  # type: ignore[arg-type]
    assert hash(Wide(flags=[True])) == hash(Wide())  # type: ignore[arg-type]


def test_a_subclass_that_annotates_a_field_anew_narrows_it_and_no_more() -> None:
    assert (Narrow().share, Narrow().mode) == (0.25, "exact")
    for arguments in ({"share": 2.0}, {"mode": "fast"}, {"mode": "other"}):
        with pytest.raises(InvalidConfig, match="Narrow's"):
            Narrow(**arguments)


def test_a_field_that_is_derived_from_others_is_not_in_json_and_cannot_come_out_of_it() -> None:
    written = encode(TaylorSeer(3, 2))
    assert written.keys() == {"type", "per_image", "scope", "stage_change", "interval", "order", "first"}
    assert decode(written) == TaylorSeer(3, 2)
    with pytest.raises(InvalidConfig, match="has no field forecast"):
        decode({**written, "forecast": encode(Reuse())})


def test_the_annotations_of_every_registered_configuration_are_known_and_hold_for_its_defaults() -> None:
    for name in dir(fastdit):
        getattr(fastdit, name)
    checked = [cls for cls in config._REGISTRY.values() if issubclass(cls, (Config, StepCache, TokenCache))]
    assert len(checked) > 20
    for cls in checked:
        annotations = dict(config._annotations(cls))
        assert annotations.keys() == {field.name for field in dataclasses.fields(cls)}
        for field in dataclasses.fields(cls):
            with pytest.raises(InvalidConfig, match=f"{cls.__name__}'s {field.name} is "):
                config.check_fields(_with(cls, field.name, object()))


def _with(cls: type[Any], wrong: str, value: object) -> Any:
    """Make an object as it is before it is checked: a value where the field is `wrong`, something right elsewhere."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        right = {"values": (1.0,), "ratios": (1.0,), "mask": (True,)}.get(field.name)
        if right is None:
            right = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        object.__setattr__(made, field.name, value if field.name == wrong else right)
    return made


def test_stacks_with_the_names_of_methods_keep_them() -> None:
    stack = Stack([TaylorSeer(3)])
    assert type(Stack.from_json(stack.to_json())[0]) is TaylorSeer
