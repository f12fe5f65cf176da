"""Other libraries' caches on the embedded pipeline, to be measured beside fastdit's own in one experiment.

Every peer gets a pipeline of its own, freshly loaded: diffusers hooks the blocks of one transformer object, and
cache-dit replaces `__call__` on the pipeline's class. Both forget a run's state when its call ends (diffusers in
`maybe_free_model_hooks`) or when the next one starts (cache-dit, which makes new contexts), so nothing needs a reset.
Only a call that raises leaves diffusers' MagCache and TaylorSeer amid its steps; after one, make the pipeline again.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fastdit.errors import FastditError
from fastdit.measure.experiment import Configuration
from fastdit.mini import load_mini
from fastdit.mini.pipeline_flux import MiniFluxPipeline
from fastdit.mini.prompts import BACKGROUNDS, OBJECTS, Scene

STEPS = 50

#: Makes a pipeline from scratch.
Maker = Callable[[], MiniFluxPipeline]


def peers() -> dict[str, Maker]:
    """Every peer at settings for speeds of about 1.5, 2 and 3 times the plain run of 50 steps, by name."""
    return {**_first_block_caches(), **_taylor_seers(), **_mag_caches(), **_db_caches()}


@dataclass(frozen=True, kw_only=True)
class Peer(Configuration):
    """A configuration with a pipeline of its own, which another library made faster."""

    pipeline: DiffusionPipeline

    @property
    def method(self) -> dict[str, Any]:
        """The class of the pipeline, in the place of a stack."""
        return {"pipeline": type(self.pipeline).__name__}

    def open(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Give its own pipeline."""
        return self.pipeline

    def told(self, pipeline: DiffusionPipeline, generate: Callable[[DiffusionPipeline], Any]) -> tuple[list[Any], int]:
        """Make a first round, whose FLOPs stand for all; there is no record."""
        return [], executed_flops(pipeline.transformer, lambda: generate(pipeline))


def executed_flops(module: torch.nn.Module, call: Callable[[], object]) -> int:
    """The FLOPs that `module` really runs in `call`, in the measure of `fastdit.meter.count`."""

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **options: object) -> int:
        flops: int = sdpa_flop_count(query, key, value)
        return flops

    # The counter knows the attention of every device but the CPU.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        call()
    return sum(counter.get_flop_counts()[type(module).__name__].values())


def configurations() -> list[Configuration]:
    """The peers as an experiment takes them, each with its own pipeline."""
    call = {"num_inference_steps": STEPS}
    return [Peer(name, call=call, pipeline=make()) for name, make in peers().items()]


def _first_block_caches() -> dict[str, Maker]:
    return {
        f"diffusers FirstBlockCache {_short(threshold)}": functools.partial(
            _hooked, diffusers.FirstBlockCacheConfig(threshold)
        )
        for threshold in (0.05, 0.09, 0.2)
    }


def _taylor_seers() -> dict[str, Maker]:
    """The default form, which forecasts attention alone, and the lite one, which forecasts the model's output.

    N is the interval between computed steps, W the count of computed steps before the first forecast.
    """
    settings = ((False, 5, 3), (True, 2, 15), (True, 2, 3), (True, 4, 3))
    return {
        f"diffusers TaylorSeer{' lite' if lite else ''} N{interval} W{before}": functools.partial(
            _hooked,
            diffusers.TaylorSeerCacheConfig(interval, before, taylor_factors_dtype=torch.float32, use_lite_mode=lite),
        )
        for lite, interval, before in settings
    }


def _mag_caches() -> dict[str, Maker]:
    """By threshold; K is the longest run of skipped steps, R the share of first steps that are always computed."""

    def make(threshold: float, longest: int, retention: float) -> MiniFluxPipeline:
        ratios = list(mag_ratios())
        return _hooked(diffusers.MagCacheConfig(threshold, longest, retention, STEPS, ratios))

    settings = ((0.03, 1, 0.2), (0.06, 3, 0.2), (0.15, 5, 0.1))
    return {
        f"diffusers MagCache {_short(threshold)} K{longest} R{_short(retention)}": functools.partial(
            make, threshold, longest, retention
        )
        for threshold, longest, retention in settings
    }


def _db_caches() -> dict[str, Maker]:
    """By threshold; F1B0 always computes the first block alone, W is the count of first steps that are computed."""
    return {
        f"cache-dit DBCache F1B0 {_short(threshold)} W{warmup}{' + TaylorSeer' if forecast else ''}": functools.partial(
            _db_cached, threshold, warmup, forecast
        )
        for forecast in (False, True)
        for threshold, warmup in ((0.06, 8), (0.12, 8), (0.3, 4))
    }


def _hooked(config: Any) -> MiniFluxPipeline:
    """A pipeline with one of diffusers' caches."""
    pipeline = _quiet_mini()
    pipeline.transformer.enable_cache(config)
    return pipeline


def _db_cached(threshold: float, warmup: int, forecast: bool) -> MiniFluxPipeline:
    """A pipeline with cache-dit's DBCache, which compares the first block; `forecast` adds its TaylorSeer calibrator.

    The pipeline's class is its own, for cache-dit patches the class, and has FLUX's name, by which cache-dit knows it.
    """
    cache_dit = _cache_dit()
    pipeline = _quiet_mini()
    pipeline.__class__ = type("FluxPipeline", (MiniFluxPipeline,), {})
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=warmup
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig() if forecast else None
    cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)
    return pipeline


def _cache_dit() -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
    try:
        return importlib.import_module("cache_dit")
    except ImportError as error:
        raise FastditError("cache-dit is not installed; run: pip install cache-dit==1.5.3") from error


@functools.cache
def mag_ratios() -> tuple[float, ...]:
    """MagCache's curve for the embedded model: diffusers' own calibration, which prints it, on prompts of training."""
    pipeline = _hooked(diffusers.MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
    scenes = (Scene((name,), background) for name, background in zip(OBJECTS, itertools.cycle(BACKGROUNDS)))
    prompts = [scene.prompt() for scene in scenes if not scene.held_out][:8]
    with redirect_stdout(io.StringIO()) as printed:
        pipeline(prompts, num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0))
    return tuple(json.loads(printed.getvalue().rpartition(":")[2]))


def _quiet_mini() -> MiniFluxPipeline:
    pipeline = load_mini()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _short(number: float) -> str:
    """A setting as names show it: .05."""
    return f"{number:g}".removeprefix("0")
