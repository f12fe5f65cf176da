"""fastdit: a composable accelerator stack over unmodified diffusers pipelines.

    fast = accelerate(pipe, [RALU("4x"), TeaCache(0.25)])
    image = fast("a red fox in the snow").images[0]

Names are imported when they are first used, so `import fastdit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caching.clusca import ClusCa
    from .caching.coefficients import Coefficients
    from .caching.duca import DuCa
    from .caching.first_block_cache import FirstBlockCache
    from .caching.forecast import Reuse, Taylor
    from .caching.step_cache import SkipPolicy
    from .caching.step_mask import StepMask
    from .caching.teacache import TeaCache
    from .caching.toca import ToCa
    from .errors import (
        ConcurrentCall,
        FastditError,
        FastditWarning,
        IncompatibleStack,
        InvalidConfig,
        NeverFired,
        NoActiveRun,
        UnsupportedModel,
    )
    from .mini import load_mini
    from .spatial.ralu import RALU
    from .stack import Plan, Stack, accelerate

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "stack",
    "Stack": "stack",
    "Plan": "stack",
    "RALU": "spatial.ralu",
    "TeaCache": "caching.teacache",
    "FirstBlockCache": "caching.first_block_cache",
    "StepMask": "caching.step_mask",
    "ToCa": "caching.toca",
    "DuCa": "caching.duca",
    "ClusCa": "caching.clusca",
    "SkipPolicy": "caching.step_cache",
    "Reuse": "caching.forecast",
    "Taylor": "caching.forecast",
    "Coefficients": "caching.coefficients",
    "load_mini": "mini",
    "FastditError": "errors",
    "UnsupportedModel": "errors",
    "IncompatibleStack": "errors",
    "InvalidConfig": "errors",
    "ConcurrentCall": "errors",
    "NoActiveRun": "errors",
    "FastditWarning": "errors",
    "NeverFired": "errors",
}

__all__ = [
    "RALU",
    "ClusCa",
    "Coefficients",
    "ConcurrentCall",
    "DuCa",
    "FastditError",
    "FastditWarning",
    "FirstBlockCache",
    "IncompatibleStack",
    "InvalidConfig",
    "NeverFired",
    "NoActiveRun",
    "Plan",
    "Reuse",
    "SkipPolicy",
    "Stack",
    "StepMask",
    "Taylor",
    "TeaCache",
    "ToCa",
    "UnsupportedModel",
    "accelerate",
    "load_mini",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
