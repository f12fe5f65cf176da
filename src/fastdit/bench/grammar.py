"""A stack as text: `ProgressiveResolution 4x, TeaCache .25 forecast=Taylor(1), Compile`.

    stack  = part, {",", part} | ""
    part   = name, {word}          as on a command line: TeaCache .25 coefficients=flux-dev
           | name, "(", ..., ")"   as in Python, which is what plans print: TeaCache(0.25, coefficients='flux-dev')
    word   = value | field, "=", value
    value  = a number, True, False, None, a quoted or bare text, (value, ...), or a part in Python's form

Nothing is run but the constructors of registered configurations.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from fastdit.accelerator import Accelerator
from fastdit.config import find_type, is_number, known_types
from fastdit.errors import InvalidConfig
from fastdit.stack import Stack

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


def parse_stack(text: str) -> Stack:
    """Read a stack from text; an empty one is the plain pipeline.

    Raises `InvalidConfig` for an unknown name, with the nearest known one, and for values that don't fit.

    >>> parse_stack("Interval 2, ToCa")
    Stack([Interval(interval=2), ToCa()])
    """
    return Stack(_accelerator(part) for part in _split(text, ","))


def stack_text(stack: Stack) -> str:
    """Write a stack as text, which `parse_stack` reads."""
    return ", ".join(accelerator.describe() for accelerator in stack)


def nearest(word: str, known: Sequence[str]) -> str:
    """Say which known word is meant, as the end of a message; nothing where none is near."""
    small = {one.lower(): one for one in known}
    found = difflib.get_close_matches(word.lower(), small, n=1)
    return f"; did you mean {small[found[0]]}?" if found else ""


def _accelerator(part: str) -> Accelerator:
    name, *words = _split(part, " ")
    made = _configured(name, [_word(word) for word in words]) if words else _evaluated(_expression(name), part)
    if not isinstance(made, Accelerator):
        raise InvalidConfig(f"{part!r} is no accelerator, but a part of one; give it as an accelerator's field")
    return made


def _split(text: str, mark: str) -> list[str]:
    """Split text where the mark stands outside of brackets and quotes; empty pieces are left out."""
    pieces, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in _QUOTES:
            quote = sign
        elif sign in _OPENING:
            depth += 1
        elif sign in _CLOSING:
            depth -= 1
        if (sign.isspace() if mark == " " else sign == mark) and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += sign
    if depth or quote:
        raise InvalidConfig(f"a bracket or a quote is not closed in {text!r}")
    found = [piece.strip() for piece in pieces]
    if mark == "," and len(found) > 1 and "" in found:
        raise InvalidConfig(f"there is nothing between two commas in {text!r}")
    return [piece for piece in found if piece]


def _word(text: str) -> tuple[str | None, Any]:
    """Read a word of a part: its field, if it names one, and its value."""
    field, mark, value = text.partition("=")
    if mark and field.isidentifier():
        return field, _value(value)
    return None, _value(text)


def _value(text: str) -> Any:
    """Read a value; what is neither Python's nor a known configuration is a text."""
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):  # a null byte is the latter
        return text
    if isinstance(node, ast.Constant | ast.Tuple | ast.List | ast.Call | ast.UnaryOp):
        return _evaluated(node, text)
    cls = find_type(text) if text.isidentifier() else None
    return text if cls is None else cls()


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise InvalidConfig(f"{text!r} is no part of a stack: write TeaCache .25, or TeaCache(0.25)") from error


def _evaluated(node: ast.expr, text: str) -> Any:
    """Give the value of a node in Python's form."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_evaluated(item, text) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and is_number(_evaluated(node.operand, text)):
        return -_evaluated(node.operand, text)
    if isinstance(node, ast.Name):
        return _configured(node.id, [])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(word.arg for word in node.keywords):
        given = [(None, _evaluated(item, text)) for item in node.args]
        return _configured(node.func.id, given + [(word.arg, _evaluated(word.value, text)) for word in node.keywords])
    raise InvalidConfig(
        f"{ast.unparse(node)!r} in {text!r} is no value: give a number, a quoted text or a configuration"
    )


def _configured(name: str, words: Sequence[tuple[str | None, Any]]) -> Any:
    cls = find_type(name)
    if cls is None:
        raise InvalidConfig(f"there is nothing called {name!r}{nearest(name, known_types())}")
    fields = [field for field in dataclasses.fields(cls) if field.init]
    positional: Iterator[str] = iter([field.name for field in fields if not field.kw_only])
    arguments: dict[str, Any] = {}
    for field, value in words:
        own = field or next(positional, None)
        if own is None:
            raise InvalidConfig(f"{name} has no further value without a name, got {value!r}; name its field")
        if own not in {one.name for one in fields}:
            raise InvalidConfig(f"{name} has no field {own!r}{nearest(own, [one.name for one in fields])}")
        if own in arguments:
            raise InvalidConfig(f"{name}'s {own} is given twice")
        arguments[own] = value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InvalidConfig(f"{name} can't be made of {arguments}: {error}") from error
