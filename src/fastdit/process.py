"""What belongs to the whole process: set by one thread at a time and put back, or heard in one thread alone.

Whatever is changed for a process (its environment, a library's verbosity, its warning filters) is changed in all its
threads. Two that change it and put back what they found leave each other's behind, unless one waits for the other.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

_turns: WeakSet[Turn] = WeakSet()


class Turn:
    """Something that one thread does at a time: `with turn.lock`. A thread may take it again while it has it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _turns.add(self)


def _renew() -> None:
    """Give a forked child locks of its own: the threads that held the parent's are not there to let them go."""
    for turn in _turns:
        turn.lock = threading.RLock()


_switching = Turn()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Undo at the end, once more where an interrupt comes while that is done; undoing twice must be undoing once."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def switching() -> Iterator[None]:
    """Be the one thread that changes something of the process, and has it back as it was at the end."""
    with _switching.lock:
        yield


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the process's environment, for one thread at a time."""
    with switching():
        before = {name: os.environ.get(name) for name in values}

        def restore() -> None:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

        with undoing(restore):
            os.environ.update(values)
            yield


class _OwnThread:
    """Takes the place of the pattern in a warning filter: it matches whatever one thread warns of, and notes that."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.texts: list[str] = []

    def match(self, text: str) -> bool:
        own = threading.get_ident() == self._thread
        if own:
            self.texts.append(text)
        return own


@contextmanager
def unheard_warnings() -> Iterator[list[str]]:
    """Hold back the warnings of this thread, and give their texts; those of others are shown as ever.

    `warnings.catch_warnings` puts all filters of the process back as it found them, another thread's own among them.
    """
    own = _OwnThread()
    held, unheard = cast(Any, warnings.filters), ("ignore", own, Warning, None, 0)

    def remove() -> None:
        for filters in (held, cast(Any, warnings.filters)):  # another, where somebody entered catch_warnings meanwhile
            while unheard in filters:
                filters.remove(unheard)

    with undoing(remove):
        held.insert(0, unheard)
        yield own.texts
