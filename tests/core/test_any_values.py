"""Whatever a configuration is given, by a caller or in a file, it stands or is refused as `InvalidConfig`."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdit
from fastdit import (
    RALU,
    BottleneckSampling,
    Coefficients,
    FastditError,
    InvalidConfig,
    JustInTime,
    MagnitudeCurve,
    ProgressiveResolution,
    Stack,
    config,
)
from fastdit.accelerator import Accelerator
from fastdit.config import Range, decode, encode

for _name in dir(fastdit):
    getattr(fastdit, _name)  # registers what it names
REGISTERED = [cls for cls in config._REGISTRY.values() if cls.__module__.startswith("fastdit.")]

Annotation = Any


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


def _endless() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return own


#: What no field wants, or wants in another way.
ODD = [
    None, True, False, 0, 1, -1, 2**63, -(2**64), 10**400, 10**5000, 0.0, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf,
    "", "4x", "text", "\ud800", "a" * 10_000, b"bytes", (), [], {}, [[]], ["4x"], [1, [2]], {1: 2}, {"type": "RALU"},
    object, object(), Unshowable(), _endless(), torch.ones(2), torch.tensor(1.5), np.float32(0.5), np.int64(3),
    np.bool_(True), np.ones(2), 1j, range(3), {1, 2}, torch.nn.Linear(1, 1), lambda: None,
]  # fmt: skip

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
odd_values = st.one_of(st.sampled_from(ODD), scalars, st.lists(scalars, max_size=3), st.tuples(scalars, scalars))
jsons = st.recursive(
    st.one_of(scalars, st.sampled_from([10**400, "4x", "RALU"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "steps", "policy", "first", "", "preset"]), inner, max_size=3),
    ),
    max_leaves=8,
)


def of(annotation: Annotation) -> st.SearchStrategy[Any]:
    """Draw what an annotation allows, as far as it is known here."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [bound for bound in arguments[1:] if isinstance(bound, Range)]
        return of(arguments[0]).filter(lambda value: all(bound.holds(value) for bound in ranges))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is ...:
        return st.lists(of(arguments[0]), min_size=1, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of, arguments))
    if arguments:
        return st.one_of(*map(of, arguments))
    if isinstance(annotation, type) and issubclass(annotation, config.Config):
        kinds = [cls for cls in REGISTERED if issubclass(cls, annotation)]
        return st.one_of(*(st.builds(made, st.just(cls)) for cls in kinds if cls.__name__ not in NEEDING))
    known: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 12),
        float: st.one_of(st.floats(0.01, 0.99), st.floats(allow_nan=False, allow_infinity=False), st.just(10**400)),
        bool: st.booleans(),
        str: st.sampled_from(["4x", "flux-dev", "native", "modulated", "stack", "nonsense"]),
        type(None): st.none(),
    }
    return known[annotation]


def made(cls: type[Any]) -> Any:
    """Make a configuration of its defaults."""
    return cls(**NEEDING.get(cls.__name__, {}))


#: What some classes need.
NEEDING = {
    "Attention": {"backend": "native"},
    "Coefficients": {"values": (1.0, 0.0)},
    "MagnitudeCurve": {"ratios": (1.0, 0.9)},
    "RALU": {},
    "StepMask": {"mask": (True, False)},
}


@st.composite
def arguments_of(draw: st.DrawFn, cls: type[Any]) -> dict[str, Any]:
    """Draw arguments for a class: some fields left out, some as annotated, some odd."""
    annotations = dict(reversed([*config._annotations(cls)]))  # a class's own come before its bases'
    given = dict(NEEDING.get(cls.__name__, {}))
    for field in dataclasses.fields(cls):
        if field.init and draw(st.booleans()):
            right = draw(st.integers(0, 3)) > 0
            given[field.name] = draw(of(annotations[field.name]) if right else odd_values)
    return given


def stands_or_is_refused(cls: type[Any], arguments: dict[str, Any]) -> None:
    try:
        value = cls(**arguments)
    except InvalidConfig as error:
        assert str(error)
        return
    assert value == cls(**arguments) and hash(value) == hash(cls(**arguments))
    written = json.dumps(encode(value), allow_nan=False)
    assert encode(decode(json.loads(written))) == encode(value)  # what is of one machine alone is not written
    if isinstance(value, Accelerator):
        assert value.describe() and value.effects is not None and value.neutral in (True, False)


@pytest.mark.parametrize("cls", REGISTERED, ids=lambda cls: cls.__name__)
@settings(max_examples=20)
@given(data=st.data())
def test_any_values_stand_and_survive_json_or_are_refused_by_name(cls: type[Any], data: st.DataObject) -> None:
    stands_or_is_refused(cls, data.draw(arguments_of(cls)))


@pytest.mark.exhaustive
@settings(max_examples=10_000)
@given(data=st.data())
def test_ten_thousand_values_of_all_classes_stand_or_are_refused_by_name(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(REGISTERED))
    stands_or_is_refused(cls, data.draw(arguments_of(cls)))


@pytest.mark.parametrize("cls", REGISTERED, ids=lambda cls: cls.__name__)
def test_every_field_takes_every_odd_value_or_refuses_it_by_name(cls: type[Any]) -> None:
    for field in dataclasses.fields(cls):
        for value in ODD if field.init else ():
            stands_or_is_refused(cls, {**NEEDING.get(cls.__name__, {}), field.name: value})


@settings(max_examples=200)
@given(data=jsons)
def test_any_json_is_a_configuration_or_is_refused_by_name(data: Any) -> None:
    for read in (decode, lambda data: Stack.from_json({"fastdit_stack": 2, "accelerators": [data]}), Stack.from_json):
        with suppress(InvalidConfig):
            read(data)


BROKEN = {
    "objects without end": '{"type": ' * 5000,
    "lists without end": "[" * 100_000 + "]" * 100_000,
    "a deep field": '{"type": "TaylorSeer", "policy": ' + "[" * 900 + "]" * 900 + "}",
    "400 digits": '{"type": "Interval", "interval": ' + "9" * 400 + "}",
    "5000 digits": '{"type": "Interval", "interval": ' + "9" * 5000 + "}",
    "no number": '{"type": "TeaCache", "threshold": NaN}',
    "a list for a name": '{"type": "RALU", "preset": ["4x"]}',
    "a list for a type": '{"type": ["RALU"]}',
    "a number for a list": '{"type": "Coefficients", "values": 3}',
    "no text": "\xff",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_that_no_stack_wrote_is_refused_by_name(tmp_path: Path, text: str) -> None:
    stack = f'{{"fastdit_stack": 2, "accelerators": [{text}]}}'
    (tmp_path / "stack.json").write_bytes(stack.encode("latin-1"))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)
    (tmp_path / "curve.json").write_bytes(text.encode("latin-1"))
    for cls in (MagnitudeCurve, Coefficients):
        with pytest.raises(InvalidConfig):
            cls.load(tmp_path / "curve.json")


def test_keys_that_are_no_text_are_refused_by_name() -> None:
    for data in ({1: 2}, {"type": "RALU", 3: 4}, {None: 1, "type": "RALU"}, {("a",): 1}):
        with pytest.raises(InvalidConfig):
            decode(data)
        with pytest.raises(InvalidConfig):
            Stack.from_json(data)
    with pytest.raises(InvalidConfig):
        Stack.from_json({"fastdit_stack": 20**5000, "accelerators": []})


@pytest.mark.parametrize(
    "value", [0, -1.0, math.nan, math.inf, "3", True, [3.0], 1e-300, 1e308, 10**400, 0.009, 101, torch.tensor(3.0)]
)
def test_a_timestep_shift_has_one_range_in_every_schedule(value: Any) -> None:
    staged = {"steps": (2, 2), "ends": (0.5,), "starts": (0.15,)}
    for make in (
        lambda: ProgressiveResolution(steps=(2, 2), base_shift=value),
        lambda: BottleneckSampling(base_shift=value),
        lambda: RALU("4x", base_shift=value),
        lambda: ProgressiveResolution(**staged, shifts=(value, 1.0)),
        lambda: JustInTime(shift=value),
    ):
        with pytest.raises(InvalidConfig, match=r"shift.* >= 0\.01 and <= 100"):
            make()


@pytest.mark.parametrize("shift", [0.01, 100])
def test_at_both_ends_of_a_shift_s_range_the_noise_levels_fall(shift: float) -> None:
    for schedule in (
        ProgressiveResolution(base_shift=shift),
        BottleneckSampling(base_shift=shift),
        JustInTime(shift=shift),
    ):
        for stage in schedule.plan(8, 8, None).stages:
            assert stage.sigmas is not None
            assert all(
                1.0 >= before > after >= 0.0 for before, after in zip(stage.sigmas, stage.sigmas[1:], strict=False)
            )


def test_a_class_that_would_skip_the_check_of_its_fields_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="write check_values instead"):

        class Unchecked(config.Config):
            def __post_init__(self) -> None:
                pass


def test_every_error_of_a_stack_is_named() -> None:
    for given_ in (3, "RALU", [3], [None], [Stack], object(), [[]]):
        with pytest.raises(FastditError):
            Stack(given_)  # type: ignore[arg-type]
