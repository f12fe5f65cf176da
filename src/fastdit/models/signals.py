"""What TeaCache may watch of a model's first block: its modulated input or its time embedding, one small function each.

A modulated signal is what the block's attention receives for the image stream. It is made with the block's own norms
and tables. A time signal is an argument of the block and does not depend on the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from fastdit.errors import InvalidConfig
from fastdit.models.family import Arguments
from fastdit.nested import ArgumentNames

#: A block of any class, or what stands in for one.
Block: TypeAlias = Any
Signal = Callable[[Block, torch.Tensor, tuple[object, ...], Arguments], torch.Tensor]
_Named = Callable[[Block, torch.Tensor, Arguments], torch.Tensor]

SIGNAL_KINDS: dict[str, str] = {
    "modulated": "the first block's modulated input",
    "time_embedding": "the time embedding before any projection",
    "projected_time_embedding": "the time embedding projected to the blocks' shifts, scales and gates",
    "hidden_states": "the first block's input before its norm",
    "first_block_residual": "what the first block adds to its input",
}
"""Everything that a published polynomial was fitted on. The last needs the block's output: no function gives it."""


@lru_cache(maxsize=64)
def _names(forward: Callable[..., object]) -> ArgumentNames:
    return ArgumentNames(forward, defaults=True)


def _by_name(function: _Named) -> Signal:
    """Turn a function of a block's named arguments into a signal, however a model passes them."""

    def signal(block: Block, hidden_states: torch.Tensor, args: tuple[object, ...], kwargs: Arguments) -> torch.Tensor:
        original: Block = getattr(block, "original", block)
        return function(block, hidden_states, _names(type(original).forward)(args, kwargs))

    return signal


def _argument(name: str) -> Signal:
    """One of the block's arguments itself."""
    return _by_name(lambda block, hidden_states, given: given[name])


def _norm(*names: str) -> Signal:
    """A norm that is called with arguments of the block and gives the modulated input first."""
    return _by_name(lambda block, hidden_states, given: block.norm1(hidden_states, *(given[n] for n in names))[0])


def _shifted(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return normed * (1 + scale) + shift


#: AdaLN-Zero as in FLUX.
_adaptive_norm = _by_name(lambda block, hidden_states, given: block.norm1(hidden_states, emb=given["temb"])[0])
#: The first six rows of the embedding modulate the image stream.
_chroma = _by_name(lambda block, hidden_states, given: block.norm1(hidden_states, emb=given["temb"][:, :6])[0])
#: A plain norm: the time embedding is the first token.
_stable_audio = _by_name(lambda block, hidden_states, given: block.norm1(hidden_states))


@_by_name
def _flux2(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """The modulation arrives ready: shift, scale and gate of the attention, then of the feed-forward."""
    modulation = given["temb_mod_img"]
    if modulation.ndim == 2:
        modulation = modulation.unsqueeze(1)
    shift, scale = modulation.chunk(6, dim=-1)[:2]
    return _shifted(block.norm1(hidden_states), scale, shift)


@_by_name
def _qwen_image(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    modulation = block.img_mod(given["temb"]).chunk(2, dim=-1)[0]
    modulated: torch.Tensor = block._modulate(block.img_norm1(hidden_states), modulation, given["modulate_index"])[0]
    return modulated


@_by_name
def _hidream(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """The wrapper's inner block holds the norms."""
    inner: Block = getattr(block, "block", block)
    shift, scale = inner.adaLN_modulation(given["temb"])[:, None].chunk(12, dim=-1)[:2]
    return _shifted(inner.norm1_i(hidden_states).to(hidden_states.dtype), scale, shift)


@_by_name
def _z_image(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """Only a scale; with a noise mask, clean and noisy tokens have one each."""

    def scale(embedding: torch.Tensor) -> torch.Tensor:
        modulation: torch.Tensor = block.adaLN_modulation(embedding)
        return 1.0 + modulation.chunk(4, dim=1)[0].unsqueeze(1)

    normed: torch.Tensor = block.attention_norm1(hidden_states)
    noisy = given["noise_mask"]
    if noisy is None:
        return normed * scale(given["adaln_input"])
    scales = scale(given["adaln_noisy"]), scale(given["adaln_clean"])
    return normed * torch.where(noisy.unsqueeze(-1) == 1, *scales)


@_by_name
def _cosmos(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """Learned positions are added before the norm."""
    if given["extra_pos_emb"] is not None:
        hidden_states = hidden_states + given["extra_pos_emb"]
    normed: torch.Tensor = block.norm1(hidden_states, given["embedded_timestep"], given["temb"])[0]
    return normed


@_by_name
def _ltx(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """A table of each block is added to a projection that all blocks share, one a token or one an image."""
    table, shared = block.scale_shift_table, given["temb"]
    shared = shared.reshape(hidden_states.shape[0], shared.shape[1], table.shape[0], -1)
    shift, scale = (table[None, None] + shared).unbind(dim=2)[:2]
    return _shifted(block.norm1(hidden_states), scale, shift)


@_by_name
def _wan(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """As in LTX, in single precision; the projection has a token axis in Wan 2.2 TI2V."""
    shared = given["temb"].float()
    table = block.scale_shift_table
    if shared.ndim == 4:
        shift, scale = ((table.unsqueeze(0) + shared)[:, :, row] for row in (0, 1))
    else:
        shift, scale = (table + shared).chunk(6, dim=1)[:2]
    return _shifted(block.norm1(hidden_states.float()), scale, shift).type_as(hidden_states)


@_by_name
def _table(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    """As in LTX, one projection an image: PixArt and Sana."""
    shared = given["timestep"].reshape(hidden_states.shape[0], 6, -1)
    shift, scale = (block.scale_shift_table[None] + shared).chunk(6, dim=1)[:2]
    return _shifted(block.norm1(hidden_states), scale, shift).to(hidden_states.dtype)


@_by_name
def _prx(block: Block, hidden_states: torch.Tensor, given: Arguments) -> torch.Tensor:
    shift, scale, _ = block.modulation(given["temb"])[0]
    return _shifted(block.img_pre_norm(hidden_states), scale, shift)


MODULATED_SIGNALS: dict[str, Signal] = {
    "AuraFlowJointTransformerBlock": _adaptive_norm,
    "BasicTransformerBlock": _table,
    "BriaFiboTransformerBlock": _adaptive_norm,
    "BriaTransformerBlock": _adaptive_norm,
    "ChromaTransformerBlock": _chroma,
    "CogVideoXBlock": _norm("encoder_hidden_states", "temb"),
    "CogView3PlusTransformerBlock": _norm("encoder_hidden_states", "emb"),
    "CogView4TransformerBlock": _norm("encoder_hidden_states", "temb"),
    "ConsisIDBlock": _norm("encoder_hidden_states", "temb"),
    "CosmosTransformerBlock": _cosmos,
    "EasyAnimateTransformerBlock": _norm("encoder_hidden_states", "temb"),
    "Flux2TransformerBlock": _flux2,
    "FluxTransformerBlock": _adaptive_norm,
    "GlmImageTransformerBlock": _norm("encoder_hidden_states", "temb"),
    "HiDreamBlock": _hidream,
    "HiDreamImageTransformerBlock": _hidream,
    "HunyuanImageTransformerBlock": _adaptive_norm,
    "HunyuanVideo15TransformerBlock": _adaptive_norm,
    "HunyuanVideoTokenReplaceTransformerBlock": _norm("temb", "token_replace_emb", "num_tokens"),
    "HunyuanVideoTransformerBlock": _adaptive_norm,
    "JointTransformerBlock": _adaptive_norm,
    "LTXVideoTransformerBlock": _ltx,
    "LongCatImageTransformerBlock": _adaptive_norm,
    "Lumina2TransformerBlock": _norm("temb"),
    "LuminaNextDiTBlock": _norm("temb"),
    "MochiTransformerBlock": _norm("temb"),
    "OvisImageTransformerBlock": _adaptive_norm,
    "PRXBlock": _prx,
    "QwenImageTransformerBlock": _qwen_image,
    "SanaTransformerBlock": _table,
    "StableAudioDiTBlock": _stable_audio,
    "WanTransformerBlock": _wan,
    "ZImageTransformerBlock": _z_image,
}
"""The modulated input by the block's class."""

TIME_SIGNALS: dict[str, Signal] = {
    "CogVideoXBlock": _argument("temb"),
    "ConsisIDBlock": _argument("temb"),
    "Lumina2TransformerBlock": _argument("temb"),
}
"""The time embedding where a block receives it alone, with no text or guidance added to it."""

PROJECTED_TIME_SIGNALS: dict[str, Signal] = {"WanTransformerBlock": _argument("temb")}
"""The projected time embedding; a Wan block's `temb` is the projection, the embedding itself reaches no block."""

_TABLES = {
    "modulated": MODULATED_SIGNALS,
    "time_embedding": TIME_SIGNALS,
    "projected_time_embedding": PROJECTED_TIME_SIGNALS,
}


def _modulates(block: Block) -> bool:
    """Whether a block of a class that can also be built without modulation has it."""
    norm_type = getattr(block, "norm_type", "ada_norm_single")
    return getattr(block, "modulation", True) is not False and norm_type == "ada_norm_single"


def signal_for(block: Block, kind: str) -> Signal | None:
    """Find the signal of a kind for a block, or what shows its parts, by its class; None where none is described.

    Raises `InvalidConfig` for an unknown kind.
    """
    if kind not in SIGNAL_KINDS:
        raise InvalidConfig(f"a signal is one of {', '.join(SIGNAL_KINDS)}, got {kind!r}")
    if kind == "hidden_states":
        return lambda block, hidden_states, args, kwargs: hidden_states
    block = getattr(block, "original", block)
    if kind == "modulated" and not _modulates(block):
        return None
    cls: Any = type(block)
    return _described(cls, kind)


@lru_cache(maxsize=256)
def _described(cls: type[Any], kind: str) -> Signal | None:
    table = _TABLES.get(kind, {})
    return next((table[base.__name__] for base in cls.__mro__ if base.__name__ in table), None)


def modulated_signal(block: Block) -> Signal | None:
    """Find the modulated input's signal for a block (or what shows the parts of one) by its class."""
    return signal_for(block, "modulated")
