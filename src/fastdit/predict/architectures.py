"""Published transformers without weights: their configurations, and what a forward of so many image tokens takes."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdit import flops
from fastdit.errors import InvalidConfig

#: Pixels along a token's side, in all of them.
TOKEN_PIXELS = 16

#: How often each number of a block's stream is read or written in a block, about.
_TRAFFIC = 24
_BYTES = 2  # bfloat16


@functools.cache
def published() -> dict[str, Any]:
    """Read the published facts: models, machines, seconds a step, gains, and their sources."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return data


@dataclass(frozen=True)
class Work:
    """What a step takes: FLOPs, and bytes that pass through memory; `weights` are those that are kept there."""

    flops: float
    bytes: float
    weights: float


@dataclass(frozen=True)
class Architecture:
    """A published model; `text` counts its text tokens, `forwards` those of a step, `depths` the blocks of each kind.

    `transformer` has few of its blocks: what they cost is the same for all of a kind.
    """

    name: str
    transformer: nn.Module
    text: int
    forwards: int
    steps: int
    depths: Mapping[str, int]

    def work(self, tokens: int) -> Work:
        """Count a step at so many image tokens."""
        return _work(self.name, tokens)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return int(_work(self.name, 64).weights)


#: Blocks of each kind in a model that is counted: the last one of a kind may differ from the others.
_FEW = 2

#: How configurations count the blocks of a kind.
_KINDS = ("num_layers", "num_single_layers", "n_layers")


@functools.cache
def architecture(name: str) -> Architecture:
    """Build a published model on the meta device, a few blocks deep. Raises `InvalidConfig` for an unknown one."""
    known = published()["models"]
    if name not in known:
        raise InvalidConfig(f"the published models are {', '.join(known)}, got {name!r}")
    row, few = known[name], _built(name)
    depths = {depth: count for depth, count in _whole(row).items() if depth in _KINDS}
    return Architecture(name, few, row["text"], row["forwards"], row["steps"], depths)


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give a model's whole configuration: its class's defaults, and what it has in their place."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, row["class"]).__init__).parameters
    own: dict[str, Any] = row["config"]
    return {name: one.default for name, one in parameters.items() if name != "self"} | own


def _built(name: str, deeper: str = "") -> Any:
    """Build a model with few blocks of every kind, and one more of one."""
    import diffusers

    row = published()["models"][name]
    depths = {depth: _FEW + (depth == deeper) for depth in _KINDS}
    few = {depth: count for depth, count in depths.items() if depth in _whole(row)}
    with torch.device("meta"):
        return getattr(diffusers, row["class"])(**{**row["config"], **few}).eval()


@functools.cache
def _work(name: str, tokens: int) -> Work:
    """Count a step: what few blocks take, and for every further one of a kind what one more takes."""
    made = architecture(name)
    base = _counted(made.transformer, tokens, made.text)
    total = list(base)
    for kind, depth in made.depths.items():
        one = _counted(_built(name, kind), tokens, made.text)
        total = [whole + (depth - _FEW) * (more - less) for whole, more, less in zip(total, one, base, strict=True)]
    spent, weights, streams = total
    return Work(made.forwards * spent, made.forwards * _BYTES * (weights + streams), _BYTES * weights)


def _counted(module: Any, tokens: int, text: int) -> tuple[int, int, int]:
    """Count a forward's FLOPs, the weights, and the numbers that the blocks read and write of their streams."""
    config = module.config
    arguments = _INPUTS[type(module).__name__](config, tokens, text)
    counted = flops.count(module, **arguments)
    width = config["dim"] if "dim" in config else config["num_attention_heads"] * config["attention_head_dim"]
    streams = (tokens + text) * width * len(counted.blocks) * _TRAFFIC
    return counted.total, sum(one.numel() for one in module.parameters()), streams


def _shaped(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _tokens(config: Mapping[str, Any], tokens: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _shaped(1, tokens, config["in_channels"]),
        "encoder_hidden_states": _shaped(1, text, config["joint_attention_dim"]),
        "timestep": _shaped(1),
    }


def _flux(config: Mapping[str, Any], tokens: int, text: int) -> dict[str, Any]:
    axes = len(config["axes_dims_rope"])
    ids = {"img_ids": _shaped(tokens, axes), "txt_ids": _shaped(text, axes)}
    pooled = config.get("pooled_projection_dim")
    more = {} if pooled is None else {"pooled_projections": _shaped(1, pooled)}
    guidance = {"guidance": _shaped(1)} if config["guidance_embeds"] else {}
    return {**_tokens(config, tokens, text), **ids, **more, **guidance}


def _qwen(config: Mapping[str, Any], tokens: int, text: int) -> dict[str, Any]:
    # A strip: the shape of the picture changes nothing of the cost.
    return {**_tokens(config, tokens, text), "img_shapes": [[(1, 1, tokens)]]}


def _z_image(config: Mapping[str, Any], tokens: int, text: int) -> dict[str, Any]:
    side = math.isqrt(tokens)
    frame = _shaped(config["in_channels"], 1, 2 * side, 2 * (tokens // side))
    return {"x": [frame], "t": _shaped(1), "cap_feats": [_shaped(text, config["cap_feat_dim"])]}


def _sd3(config: Mapping[str, Any], tokens: int, text: int) -> dict[str, Any]:
    side, patch = math.isqrt(tokens), config["patch_size"]
    frame = _shaped(1, config["in_channels"], patch * side, patch * (tokens // side))
    pooled = _shaped(1, config["pooled_projection_dim"])
    return {**_tokens(config, tokens, text), "hidden_states": frame, "pooled_projections": pooled}


_INPUTS: dict[str, Callable[[Mapping[str, Any], int, int], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "SD3Transformer2DModel": _sd3,
}
