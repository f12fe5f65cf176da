"""What of a pipeline there is to accelerate: its transformers, their block lists, and its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from fastdit.accelerator import Accelerator
from fastdit.config import is_count
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.family import Arguments, Family, Pipeline, family_of
from fastdit.models.undescribed import annotated, why_not
from fastdit.nested import call_signature

#: What a bare module is called, as if it were a pipeline's.
BARE = "transformer"


def parts_of(pipeline: Pipeline) -> dict[str, Any]:
    """List a pipeline's parts by name: its components, and the schedulers and modules that it keeps beside them."""
    beside = {name: part for name, part in vars(pipeline).items() if _is_scheduler(part) or isinstance(part, nn.Module)}
    return {**pipeline.components, **beside}


def schedulers_of(base: Pipeline | nn.Module) -> dict[str, Any]:
    """List the schedulers of a pipeline by name, whatever that is; a bare module has none."""
    parts = {} if isinstance(base, nn.Module) else parts_of(base)
    return {name: part for name, part in parts.items() if _is_scheduler(part)}


def guiders_of(base: Pipeline | nn.Module) -> dict[str, Any]:
    """List the parts of a pipeline that are told at each step where its run stands, by name."""
    parts = {} if isinstance(base, nn.Module) else parts_of(base)
    return {name: part for name, part in parts.items() if hasattr(type(part), "prepare_inputs")}


def _is_scheduler(part: Any) -> bool:
    return hasattr(type(part), "set_timesteps") and hasattr(type(part), "step")


def is_transformer(pipeline: Pipeline, name: str, part: Any) -> bool:
    """Whether a part of a pipeline is one of its transformers: named so, or of the class of the one that is."""
    if not isinstance(part, nn.Module) or name == BARE:
        return isinstance(part, nn.Module)
    kinds = (*annotated(type(pipeline), BARE), type(getattr(pipeline, BARE, None)).__name__)
    return type(getattr(part, "_orig_mod", part)).__name__ in kinds


def transformers_of(base: Pipeline | nn.Module, replaced: Mapping[str, Any] | None = None) -> dict[str, nn.Module]:
    """Find the transformers of a pipeline, or the bare module itself. Raises `UnsupportedModel` if there are none.

    `replaced` are parts that stand in the place of the pipeline's own.
    """
    if isinstance(base, nn.Module):
        return {BARE: base}
    if not isinstance(base, pipeline_type()):
        raise UnsupportedModel(
            f"accelerate takes a diffusers pipeline or a torch module, got {type(base).__name__}; pass the pipeline "
            "object itself"
        )
    parts = {**parts_of(cast(Pipeline, base)), **(replaced or {})}
    modules = {name: part for name, part in parts.items() if is_transformer(cast(Pipeline, base), name, part)}
    if not modules:
        components = ", ".join(parts)
        raise UnsupportedModel(
            f"{type(base).__name__} has no transformer (its components are {components}); fastdit accelerates "
            "diffusion transformers"
        )
    return modules


def require_family(base: Pipeline | nn.Module, accelerator: Accelerator) -> Family:
    """Give the description of a pipeline's family. Raises `UnsupportedModel`, with the reason, if there is none."""
    family = None if isinstance(base, nn.Module) else family_of(base)
    if family is None:
        raise UnsupportedModel(
            f"{accelerator.describe()} must know how tokens lie, and can't in {type(base).__name__}: {_why_not(base)}; "
            "use it with a pipeline that `fastdit matrix` lists, describe the family in fastdit.models, or keep to "
            "accelerators that need no description of the tokens"
        )
    return family


def arguments_of(pipeline: Pipeline, **asked: int | None) -> dict[str, Any]:
    """Give the arguments of a call: the defaults, and what is asked for in their place; None stands for nothing asked.

    Raises `InvalidConfig` for what the pipeline does not take, and for a number of steps that is none.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    parameters = call_signature(type(pipeline)).parameters
    if unknown := [name for name in given if name not in parameters]:
        raise InvalidConfig(f"{type(pipeline).__name__} takes no {' and no '.join(unknown)}; leave it out")
    steps = given.get("num_inference_steps", 1)
    if not is_count(steps, 1):
        raise InvalidConfig(f"num_inference_steps is a whole number, at least 1, got {steps!r}")
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    return {**defaults, **given}


def grid_of(family: Family, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
    """Give the rows and columns of image tokens of a call. Raises `InvalidConfig` where its size holds none."""
    for name in ("height", "width"):
        if (side := arguments.get(name)) is not None and side < 0:
            raise InvalidConfig(
                f"{name} is a number of pixels, got {side}; give one that is a multiple of a token's side"
            )
    height, width = family.size(pipeline, arguments)
    rows, columns = family.grid(pipeline, height, width)
    if rows < 1 or columns < 1:
        raise InvalidConfig(f"{height} x {width} px are too few for one token; give a larger height or width")
    return rows, columns


def size_remark(family: Family, pipeline: Pipeline, arguments: Arguments) -> tuple[str, ...]:
    """Say that a call's size is no whole number of tokens, where it is none."""
    height, width = family.size(pipeline, arguments)
    rows, columns = family.grid(pipeline, height, width)
    fits = family.grid(pipeline, height - 1, width - 1) == (rows - 1, columns - 1)
    cut = (
        f"{height} x {width} px are no whole number of tokens: the pipeline cuts them to {rows} x {columns}, or refuses"
    )
    return () if fits else (cut,)


def _why_not(base: Pipeline | nn.Module) -> str:
    return "a bare module has no description of its pipeline" if isinstance(base, nn.Module) else why_not(type(base))


def require_block_lists(transformers: Mapping[str, nn.Module], accelerator: Accelerator) -> None:
    """Raise `UnsupportedModel` if a transformer has no block lists among its children."""
    for name, module in transformers.items():
        if not any(isinstance(child, nn.ModuleList) and len(child) for child in module.children()):
            raise UnsupportedModel(
                f"{accelerator.describe()} skips blocks, and {name} ({type(module).__name__}) has no nn.ModuleList of "
                "blocks among its children; use accelerators that need no blocks"
            )


def pipeline_type() -> type:
    """Give the class of all pipelines, whose import waits until it is needed."""
    from diffusers import DiffusionPipeline

    return cast(type, DiffusionPipeline)
