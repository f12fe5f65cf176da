"""FLUX.1: packed 2 x 2 latent patches with rotary position ids (dev, schnell, Krea, Kontext's text-to-image use)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastdit.layout import TokenLayout, assembled, patches
from fastdit.structure import PerImage

from .family import decoded


class FluxFamily:
    """Tokens of FLUX.1: 64 channels = 16 latent channels x 2 x 2 pixels, ids (0, row, column)."""

    name = "FLUX.1"
    _pipelines = ("FluxPipeline", "FluxKontextPipeline")
    _refused = (
        "ip_adapter_image",
        "ip_adapter_image_embeds",
        "negative_ip_adapter_image",
        "negative_ip_adapter_image_embeds",
        "image",
    )

    def matches(self, pipeline: Any) -> bool:
        return any(cls.__name__ in self._pipelines for cls in type(pipeline).__mro__)

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        default = pipeline.default_sample_size * pipeline.vae_scale_factor
        height, width = arguments.get("height") or default, arguments.get("width") or default
        if area := arguments.get("max_area"):
            # Kontext keeps the aspect ratio that was asked for and makes the area its own.
            aspect, multiple = width / height, pipeline.vae_scale_factor * 2
            width = round((area * aspect) ** 0.5) // multiple * multiple
            height = round((area / aspect) ** 0.5) // multiple * multiple
        return height, width

    def grid(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        patch = pipeline.vae_scale_factor * 2
        return int(height) // patch, int(width) // patch

    def refusal(self, pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
        given = [name for name in self._refused if arguments.get(name) is not None]
        if given:
            return f"{', '.join(given)} can't follow a token layout that changes; leave it out or drop the schedule"
        attention = arguments.get("joint_attention_kwargs") or {}
        if "ip_adapter_masks" in attention:
            return "joint_attention_kwargs['ip_adapter_masks'] is tied to one resolution; leave it out"
        return None

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return tokens

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return assembled(latents, rows, columns)

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        return patches(frames)

    def decode(self, pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
        return decoded(pipeline.vae, frames)

    def place(self, arguments: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        ids = arguments["img_ids"]
        positions = layout.positions(ids.device)[0]
        # Fractional places are exact in float32 and not in bfloat16, so the ids' dtype is not kept.
        return {**arguments, "img_ids": nn.functional.pad(positions, (1, 0))}

    def child_overrides(self, transformer: Any, layout: TokenLayout, latents: torch.Tensor) -> dict[str, Any]:
        positions = layout.positions(latents.device)
        if positions.shape[0] == 1:
            return {}
        return {"pos_embed": _PerImagePositions(transformer.pos_embed, nn.functional.pad(positions, (1, 0)))}

    def pipeline_overrides(self) -> tuple[str, ...]:
        return ("_unpack_latents",)


class _PerImagePositions(nn.Module):
    """A rotary embedding with ids of its own for every image of a batch; the text's ids are shared."""

    def __init__(self, embed: nn.Module, image_ids: torch.Tensor) -> None:
        super().__init__()
        # Kept out of the module tree: the child belongs to the user's model.
        self.__dict__["_embed"] = embed
        self.__dict__["_image_ids"] = image_ids

    def forward(self, ids: torch.Tensor) -> tuple[_PerImageTable, ...]:
        embed, image_ids = self.__dict__["_embed"], self.__dict__["_image_ids"]
        batch, count, _ = image_ids.shape
        if "_tables" not in self.__dict__:
            # A place's row depends on that place alone, so the images' rows are made once a stage.
            flat = embed(image_ids.flatten(0, 1))
            self.__dict__["_tables"] = [table.unflatten(0, (batch, count)) for table in flat]
        text = embed(ids[: ids.shape[0] - count])
        return tuple(
            _PerImageTable(torch.cat([words.expand(batch, -1, -1), image], dim=1))
            for words, image in zip(text, self.__dict__["_tables"], strict=True)
        )


class _PerImageTable(PerImage):
    """A rotary table [B, S, D] that answers an index meant for a shared [S, D] one with its batch in place."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def __getitem__(self, key: tuple[Any, ...]) -> torch.Tensor:
        # A shared table is indexed [None, :, None, :] or [None, None, :, :]; the leading None is our batch.
        if not isinstance(key, tuple) or key[0] is not None:
            raise TypeError(f"a rotary table of a batch was indexed with {key!r}, which it can't answer")
        places = (slice(None), *key[1:])
        return self._table[places]

    def rows(self, index: torch.Tensor) -> _PerImageTable:
        return _PerImageTable(self._table.index_select(0, index))


FLUX = FluxFamily()
