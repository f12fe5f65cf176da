"""fastdit: a composable accelerator stack over unmodified diffusers pipelines.

    fast = accelerate(pipe, [RALU("4x"), TeaCache(0.25)])
    image = fast("a cat left of a tree on a green background").images[0]

Names are imported when they are first used, so `import fastdit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdit.acceleration import accelerate as accelerate
    from fastdit.attention.dispatcher import Attention as Attention
    from fastdit.bench.budget import Budget as Budget
    from fastdit.bench.experiment import Experiment as Experiment
    from fastdit.bench.source import Source as Source
    from fastdit.citation import cite as cite
    from fastdit.engine.aot import AOT as AOT
    from fastdit.engine.compile import Compile as Compile
    from fastdit.errors import ConcurrentCall as ConcurrentCall
    from fastdit.errors import EngineBuildFailed as EngineBuildFailed
    from fastdit.errors import EngineMismatch as EngineMismatch
    from fastdit.errors import EngineWarning as EngineWarning
    from fastdit.errors import FastditError as FastditError
    from fastdit.errors import FastditWarning as FastditWarning
    from fastdit.errors import IncompatibleStack as IncompatibleStack
    from fastdit.errors import InvalidConfig as InvalidConfig
    from fastdit.errors import NeverFired as NeverFired
    from fastdit.errors import NoActiveRun as NoActiveRun
    from fastdit.errors import UnsupportedModel as UnsupportedModel
    from fastdit.mini import load_mini as load_mini
    from fastdit.plan import Plan as Plan
    from fastdit.schedule.bottleneck_sampling import BottleneckSampling as BottleneckSampling
    from fastdit.schedule.just_in_time import JustInTime as JustInTime
    from fastdit.schedule.lifts.corrected import CorrectedLift as CorrectedLift
    from fastdit.schedule.lifts.latent import LatentLift as LatentLift
    from fastdit.schedule.lifts.pixel import PixelLift as PixelLift
    from fastdit.schedule.lifts.spectral import SpectralLift as SpectralLift
    from fastdit.schedule.lifts.token_copy import TokenCopy as TokenCopy
    from fastdit.schedule.progressive_resolution import ProgressiveResolution as ProgressiveResolution
    from fastdit.schedule.ralu import RALU as RALU
    from fastdit.schedule.selectors.edges import Edges as Edges
    from fastdit.schedule.selectors.latent_variance import LatentVariance as LatentVariance
    from fastdit.schedule.selectors.pixel_gradient import PixelGradient as PixelGradient
    from fastdit.schedule.selectors.text_attention import TextAttention as TextAttention
    from fastdit.schedule.selectors.velocity_variance import VelocityVariance as VelocityVariance
    from fastdit.stack import Stack as Stack
    from fastdit.step_cache.coefficients import Coefficients as Coefficients
    from fastdit.step_cache.curves import MagnitudeCurve as MagnitudeCurve
    from fastdit.step_cache.forecasters.dmd import DMD as DMD
    from fastdit.step_cache.forecasters.foca import FoCa as FoCa
    from fastdit.step_cache.forecasters.reuse import Reuse as Reuse
    from fastdit.step_cache.forecasters.taylor import PublishedTaylor as PublishedTaylor
    from fastdit.step_cache.forecasters.taylor import Taylor as Taylor
    from fastdit.step_cache.gates.cg_taylor import CGTaylor as CGTaylor
    from fastdit.step_cache.gates.dbcache import DBCache as DBCache
    from fastdit.step_cache.gates.easycache import EasyCache as EasyCache
    from fastdit.step_cache.gates.first_block_cache import FirstBlockCache as FirstBlockCache
    from fastdit.step_cache.gates.fora import FORA as FORA
    from fastdit.step_cache.gates.interval import Interval as Interval
    from fastdit.step_cache.gates.magcache import MagCache as MagCache
    from fastdit.step_cache.gates.seacache import SeaCache as SeaCache
    from fastdit.step_cache.gates.step_mask import StepMask as StepMask
    from fastdit.step_cache.gates.taylorseer import TaylorSeer as TaylorSeer
    from fastdit.step_cache.gates.teacache import TeaCache as TeaCache
    from fastdit.step_cache.policy import SkipPolicy as SkipPolicy
    from fastdit.token_cache.clusca import ClusCa as ClusCa
    from fastdit.token_cache.duca import DuCa as DuCa
    from fastdit.token_cache.toca import ToCa as ToCa

__version__ = "0.1.0"

#: Where the public names live.
_PUBLIC = {
    "acceleration": ("accelerate",),
    "attention.dispatcher": ("Attention",),
    "citation": ("cite",),
    "bench.budget": ("Budget",),
    "bench.experiment": ("Experiment",),
    "bench.source": ("Source",),
    "engine.aot": ("AOT",),
    "engine.compile": ("Compile",),
    "mini": ("load_mini",),
    "plan": ("Plan",),
    "schedule.bottleneck_sampling": ("BottleneckSampling",),
    "schedule.just_in_time": ("JustInTime",),
    "schedule.progressive_resolution": ("ProgressiveResolution",),
    "schedule.ralu": ("RALU",),
    "stack": ("Stack",),
    "step_cache.coefficients": ("Coefficients",),
    "step_cache.curves": ("MagnitudeCurve",),
    "step_cache.forecasters.dmd": ("DMD",),
    "step_cache.forecasters.foca": ("FoCa",),
    "step_cache.forecasters.reuse": ("Reuse",),
    "step_cache.forecasters.taylor": ("PublishedTaylor", "Taylor"),
    "step_cache.gates.cg_taylor": ("CGTaylor",),
    "step_cache.gates.dbcache": ("DBCache",),
    "step_cache.gates.easycache": ("EasyCache",),
    "step_cache.gates.first_block_cache": ("FirstBlockCache",),
    "step_cache.gates.fora": ("FORA",),
    "step_cache.gates.interval": ("Interval",),
    "step_cache.gates.magcache": ("MagCache",),
    "step_cache.gates.seacache": ("SeaCache",),
    "step_cache.gates.step_mask": ("StepMask",),
    "step_cache.gates.taylorseer": ("TaylorSeer",),
    "step_cache.gates.teacache": ("TeaCache",),
    "step_cache.policy": ("SkipPolicy",),
    "token_cache.clusca": ("ClusCa",),
    "token_cache.duca": ("DuCa",),
    "token_cache.toca": ("ToCa",),
}

#: Names of submodules that may be imported from here, too.
_BESIDE = {
    "errors": (
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
    ),
    "schedule.lifts": ("CorrectedLift", "LatentLift", "PixelLift", "SpectralLift", "TokenCopy"),
    "schedule.selectors": ("Edges", "LatentVariance", "PixelGradient", "TextAttention", "VelocityVariance"),
}

_HOMES = {name: module for homes in (_PUBLIC, _BESIDE) for module, names in homes.items() for name in names}

__all__ = sorted(name for names in _PUBLIC.values() for name in names)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
