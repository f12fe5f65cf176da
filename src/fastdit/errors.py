"""Every error and warning that fastdit raises by name; each message says what was wrong, where, and what to do next."""

from __future__ import annotations

__all__ = [
    "ConcurrentCall",
    "EngineBuildFailed",
    "EngineMismatch",
    "EngineWarning",
    "FastditError",
    "FastditWarning",
    "IncompatibleStack",
    "InvalidConfig",
    "NeverFired",
    "NoActiveRun",
    "UnsupportedModel",
]


class FastditError(Exception):
    """Base of all errors that fastdit raises on purpose."""


class UnsupportedModel(FastditError):
    """The model's blocks, tokens or signal can't be established for what the stack needs."""


class IncompatibleStack(FastditError):
    """Two parts of a stack, or a stack and the state of the model, can't go together."""


class InvalidConfig(FastditError, ValueError):
    """A value of a configuration or of a call can't be honoured."""


class ConcurrentCall(FastditError, RuntimeError):
    """A second call reached a twin while its first one was still running."""


class NoActiveRun(FastditError, RuntimeError):
    """An accelerated module was called outside a run, where its caches have no clock."""


class EngineMismatch(FastditError, RuntimeError):
    """A call reached an engine that was built for another shape, stride, dtype, device, module or stage."""


class EngineBuildFailed(FastditError, RuntimeError):
    """An engine could not be built, and no eager fallback was asked for."""


class FastditWarning(UserWarning):
    """Base of all warnings that fastdit emits."""


class EngineWarning(FastditWarning):
    """What is kept of an engine can't be used or kept, or a piece of the model runs eagerly in its place."""


class NeverFired(FastditWarning):
    """An accelerator of the stack changed nothing in a whole run."""
