"""How a twin's class is made: a subclass with the same name whose own methods come first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastdit.nested import Kwargs


def twin_class(cls: type, members: Kwargs) -> type:
    """Subclass `cls` under its own name with `members`; the original class is not written to."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **members})


def overriding(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Give `replacement` the name, documentation and signature of the method that it stands in for."""
    return functools.wraps(original)(replacement)
