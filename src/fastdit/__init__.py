"""fastdit: a composable accelerator stack over unmodified diffusers pipelines.

    fast = accelerate(pipe, [RALU("4x"), TeaCache(0.25)])
    image = fast("a red fox in the snow").images[0]

Names are imported when they are first used, so `import fastdit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate
    from .attention.dispatcher import Attention
    from .caching.clusca import ClusCa
    from .caching.coefficients import Coefficients
    from .caching.compositions import FORA, DBCache, TaylorSeer
    from .caching.curves import MagnitudeCurve
    from .caching.duca import DuCa
    from .caching.easycache import EasyCache
    from .caching.first_block_cache import FirstBlockCache
    from .caching.forecast import DMD, FoCa, PublishedTaylor, Reuse, Taylor
    from .caching.magcache import MagCache
    from .caching.policy import SkipPolicy
    from .caching.seacache import SeaCache
    from .caching.step_mask import Interval, StepMask
    from .caching.teacache import TeaCache
    from .caching.toca import ToCa
    from .engines.aot import AOT
    from .engines.compile import Compile
    from .errors import (
        ConcurrentCall,
        EngineBuildFailed,
        EngineMismatch,
        EngineWarning,
        FastditError,
        FastditWarning,
        IncompatibleStack,
        InvalidConfig,
        NeverFired,
        NoActiveRun,
        UnsupportedModel,
    )
    from .mini import load_mini
    from .plan import Plan
    from .spatial.bottleneck import BottleneckSampling
    from .spatial.corrected_lift import CorrectedLift
    from .spatial.just_in_time import JustInTime
    from .spatial.lift import LatentLift, PixelLift
    from .spatial.progressive import ProgressiveResolution
    from .spatial.ralu import RALU
    from .spatial.selector import Edges, LatentVariance, PixelGradient, VelocityVariance
    from .spatial.text_attention import TextAttention
    from .spatial.token_copy import TokenCopy
    from .stack import Stack

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "acceleration",
    "Stack": "stack",
    "Plan": "plan",
    "ProgressiveResolution": "spatial.progressive",
    "RALU": "spatial.ralu",
    "JustInTime": "spatial.just_in_time",
    "BottleneckSampling": "spatial.bottleneck",
    "TokenCopy": "spatial.token_copy",
    "Edges": "spatial.selector",
    "LatentVariance": "spatial.selector",
    "PixelGradient": "spatial.selector",
    "VelocityVariance": "spatial.selector",
    "TextAttention": "spatial.text_attention",
    "PixelLift": "spatial.lift",
    "CorrectedLift": "spatial.corrected_lift",
    "LatentLift": "spatial.lift",
    "TeaCache": "caching.teacache",
    "FirstBlockCache": "caching.first_block_cache",
    "EasyCache": "caching.easycache",
    "MagCache": "caching.magcache",
    "MagnitudeCurve": "caching.curves",
    "SeaCache": "caching.seacache",
    "Interval": "caching.step_mask",
    "StepMask": "caching.step_mask",
    "TaylorSeer": "caching.compositions",
    "DBCache": "caching.compositions",
    "FORA": "caching.compositions",
    "SkipPolicy": "caching.policy",
    "ToCa": "caching.toca",
    "DuCa": "caching.duca",
    "ClusCa": "caching.clusca",
    "Attention": "attention.dispatcher",
    "Reuse": "caching.forecast",
    "Taylor": "caching.forecast",
    "PublishedTaylor": "caching.forecast",
    "FoCa": "caching.forecast",
    "DMD": "caching.forecast",
    "Coefficients": "caching.coefficients",
    "AOT": "engines.aot",
    "Compile": "engines.compile",
    "load_mini": "mini",
    "FastditError": "errors",
    "UnsupportedModel": "errors",
    "IncompatibleStack": "errors",
    "InvalidConfig": "errors",
    "ConcurrentCall": "errors",
    "NoActiveRun": "errors",
    "FastditWarning": "errors",
    "NeverFired": "errors",
    "EngineBuildFailed": "errors",
    "EngineMismatch": "errors",
    "EngineWarning": "errors",
}

__all__ = [
    "AOT",
    "DMD",
    "FORA",
    "RALU",
    "Attention",
    "BottleneckSampling",
    "ClusCa",
    "Coefficients",
    "Compile",
    "ConcurrentCall",
    "CorrectedLift",
    "DBCache",
    "DuCa",
    "EasyCache",
    "Edges",
    "EngineBuildFailed",
    "EngineMismatch",
    "EngineWarning",
    "FastditError",
    "FastditWarning",
    "FirstBlockCache",
    "FoCa",
    "IncompatibleStack",
    "Interval",
    "InvalidConfig",
    "JustInTime",
    "LatentLift",
    "LatentVariance",
    "MagCache",
    "MagnitudeCurve",
    "NeverFired",
    "NoActiveRun",
    "PixelGradient",
    "PixelLift",
    "Plan",
    "ProgressiveResolution",
    "PublishedTaylor",
    "Reuse",
    "SeaCache",
    "SkipPolicy",
    "Stack",
    "StepMask",
    "Taylor",
    "TaylorSeer",
    "TeaCache",
    "TextAttention",
    "ToCa",
    "TokenCopy",
    "UnsupportedModel",
    "VelocityVariance",
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
