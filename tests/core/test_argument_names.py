"""A call's arguments are named alike, however the call gives them."""

from __future__ import annotations

from typing import Any

import pytest

from fastdit.nested import ArgumentNames


class Block:
    """Takes arguments in every way that a forward of diffusers does."""

    def forward(self, hidden_states: Any, temb: Any = None, *, scale: float = 1.0, **kwargs: Any) -> None: ...


CALLS: list[tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
    ((), {"temb": 2, "hidden_states": 1}, {"hidden_states": 1, "temb": 2}),
    ((1,), {"temb": 2}, {"hidden_states": 1, "temb": 2}),
    ((1, 2), {}, {"hidden_states": 1, "temb": 2}),
    ((), {"scale": 3.0, "hidden_states": 1}, {"hidden_states": 1, "scale": 3.0}),
    ((), {"mask": 4, "hidden_states": 1}, {"hidden_states": 1, "mask": 4}),
]


@pytest.mark.parametrize(("args", "kwargs", "named"), CALLS)
def test_arguments_come_by_name_in_the_forward_s_order(args: Any, kwargs: Any, named: dict[str, Any]) -> None:
    found = ArgumentNames(Block.forward)(args, kwargs)
    assert list(found.items()) == list(named.items())


@pytest.mark.parametrize(("args", "kwargs", "named"), CALLS)
def test_what_a_call_leaves_out_has_its_default(args: Any, kwargs: Any, named: dict[str, Any]) -> None:
    found = ArgumentNames(Block.forward, defaults=True)(args, kwargs)
    assert found == {"temb": None, "scale": 1.0, **named}


@pytest.mark.parametrize(("args", "kwargs"), [((), {"temb": 1}), ((1, 2, 3), {}), ((1,), {"hidden_states": 1})])
def test_a_call_that_the_forward_would_refuse_is_refused(args: Any, kwargs: Any) -> None:
    with pytest.raises(TypeError):
        ArgumentNames(Block.forward)(args, kwargs)
