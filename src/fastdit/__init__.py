"""fastdit: a composable accelerator stack over unmodified diffusers pipelines.

    fast = accelerate(pipe, [RALU("4x"), TeaCache(0.25)])
    image = fast("a red fox in the snow").images[0]

Names are imported when they are first used, so `import fastdit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdit.acceleration import accelerate
    from fastdit.attention.dispatcher import Attention
    from fastdit.engine.aot import AOT
    from fastdit.engine.compile import Compile
    from fastdit.errors import (
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
    from fastdit.mini import load_mini
    from fastdit.plan import Plan
    from fastdit.schedule.bottleneck_sampling import BottleneckSampling
    from fastdit.schedule.just_in_time import JustInTime
    from fastdit.schedule.lifts.corrected import CorrectedLift
    from fastdit.schedule.lifts.latent import LatentLift
    from fastdit.schedule.lifts.pixel import PixelLift
    from fastdit.schedule.lifts.token_copy import TokenCopy
    from fastdit.schedule.progressive_resolution import ProgressiveResolution
    from fastdit.schedule.ralu import RALU
    from fastdit.schedule.selectors.edges import Edges
    from fastdit.schedule.selectors.latent_variance import LatentVariance
    from fastdit.schedule.selectors.pixel_gradient import PixelGradient
    from fastdit.schedule.selectors.text_attention import TextAttention
    from fastdit.schedule.selectors.velocity_variance import VelocityVariance
    from fastdit.stack import Stack
    from fastdit.step_cache.coefficients import Coefficients
    from fastdit.step_cache.curves import MagnitudeCurve
    from fastdit.step_cache.forecasters.dmd import DMD
    from fastdit.step_cache.forecasters.foca import FoCa
    from fastdit.step_cache.forecasters.reuse import Reuse
    from fastdit.step_cache.forecasters.taylor import PublishedTaylor, Taylor
    from fastdit.step_cache.gates.dbcache import DBCache
    from fastdit.step_cache.gates.easycache import EasyCache
    from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
    from fastdit.step_cache.gates.fora import FORA
    from fastdit.step_cache.gates.interval import Interval
    from fastdit.step_cache.gates.magcache import MagCache
    from fastdit.step_cache.gates.seacache import SeaCache
    from fastdit.step_cache.gates.step_mask import StepMask
    from fastdit.step_cache.gates.taylorseer import TaylorSeer
    from fastdit.step_cache.gates.teacache import TeaCache
    from fastdit.step_cache.policy import SkipPolicy
    from fastdit.token_cache.clusca import ClusCa
    from fastdit.token_cache.duca import DuCa
    from fastdit.token_cache.toca import ToCa

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "acceleration",
    "Stack": "stack",
    "Plan": "plan",
    "ProgressiveResolution": "schedule.progressive_resolution",
    "RALU": "schedule.ralu",
    "JustInTime": "schedule.just_in_time",
    "BottleneckSampling": "schedule.bottleneck_sampling",
    "TokenCopy": "schedule.lifts.token_copy",
    "Edges": "schedule.selectors.edges",
    "LatentVariance": "schedule.selectors.latent_variance",
    "PixelGradient": "schedule.selectors.pixel_gradient",
    "VelocityVariance": "schedule.selectors.velocity_variance",
    "TextAttention": "schedule.selectors.text_attention",
    "PixelLift": "schedule.lifts.pixel",
    "CorrectedLift": "schedule.lifts.corrected",
    "LatentLift": "schedule.lifts.latent",
    "TeaCache": "step_cache.gates.teacache",
    "FirstBlockCache": "step_cache.gates.first_block_cache",
    "EasyCache": "step_cache.gates.easycache",
    "MagCache": "step_cache.gates.magcache",
    "MagnitudeCurve": "step_cache.curves",
    "SeaCache": "step_cache.gates.seacache",
    "Interval": "step_cache.gates.interval",
    "StepMask": "step_cache.gates.step_mask",
    "TaylorSeer": "step_cache.gates.taylorseer",
    "DBCache": "step_cache.gates.dbcache",
    "FORA": "step_cache.gates.fora",
    "SkipPolicy": "step_cache.policy",
    "ToCa": "token_cache.toca",
    "DuCa": "token_cache.duca",
    "ClusCa": "token_cache.clusca",
    "Attention": "attention.dispatcher",
    "Reuse": "step_cache.forecasters.reuse",
    "Taylor": "step_cache.forecasters.taylor",
    "PublishedTaylor": "step_cache.forecasters.taylor",
    "FoCa": "step_cache.forecasters.foca",
    "DMD": "step_cache.forecasters.dmd",
    "Coefficients": "step_cache.coefficients",
    "AOT": "engine.aot",
    "Compile": "engine.compile",
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
