"""Parts of a pipeline that keep something of a call in themselves, for twins in several threads that share them.

A tokenizer sets its padding and its truncation before it reads a prompt; an autoencoder of videos remembers the frames
before. Such a part serves one twin after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from fastdit.nested import Value
from fastdit.process import Turn
from fastdit.structure import same_object_twin

_READING = ("__call__", "encode", "encode_plus", "batch_encode_plus", "tokenize", "pad", "apply_chat_template")
_CODING = ("encode", "decode", "forward")

#: Tokenizers are inside of other parts, too, and are quick, so that all of them take turns with one another.
_tokenizing = Turn()

_shown: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

#: Weak, as a twin's class holds what is behind the twin.
_known: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def in_turn(part: Value) -> Value:
    """Give a part that serves one thread at a time while it keeps something of a call; any other part is its own.

    What is given is the same object in another class: whatever is set on either is set on both.
    """
    methods = _keeping(type(part))
    if not methods:
        return part
    if part not in _shown:  # of two threads that find it missing, both are given what the first one made
        _shown.setdefault(part, _taking_turns(part, methods, Turn() if methods is not _READING else _tokenizing))
    return _shown[part]


def _keeping(cls: type) -> tuple[str, ...]:
    """Name the methods during which a class's objects keep something of a call in themselves."""
    if cls not in _known:
        _known[cls] = _found(cls)
    return _known[cls]


def _found(cls: type) -> tuple[str, ...]:
    if hasattr(cls, "convert_tokens_to_ids") or hasattr(cls, "apply_chat_template"):
        return _READING
    return _CODING if hasattr(cls, "clear_cache") and hasattr(cls, "decode") else ()


def _taking_turns(part: Any, methods: tuple[str, ...], turn: Turn) -> Any:
    """Make the same object in a class whose `methods` are called by one thread at a time."""
    cls = type(part)
    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for name in methods:
        if hasattr(cls, name):
            members[name] = _taken(cls, name, turn) if name.startswith("__") else _replaceable(cls, name, turn)
    # Pickled and copied, it is an object of the class itself.
    members["__reduce__"] = lambda self: (_itself, (same_object_twin(self, cls),))
    return same_object_twin(part, type(cls.__name__, (cls,), members))


def _taken(cls: type, name: str, turn: Turn) -> Callable[..., Value]:
    def method(self: Any, *args: Value, **kwargs: Value) -> Value:
        with turn.lock:
            # One that was replaced on the object itself (by a compiled one) comes before the class's.
            return (vars(self).get(name) or getattr(cls, name).__get__(self))(*args, **kwargs)

    return functools.wraps(getattr(cls, name))(method)


def _replaceable(cls: type, name: str, turn: Turn) -> property:
    """Show a method that is taken in turn, and keep what is set in its place where the object itself would."""
    method = _taken(cls, name, turn)
    return property(
        lambda self: method.__get__(self),
        lambda self, value: vars(self).__setitem__(name, value),
        lambda self: vars(self).__delitem__(name),
    )


def _itself(part: Value) -> Value:
    return part
