"""Qwen-Image: packed tokens whose positions the model makes of the pictures' sizes, counted from their middle.

The structural twin's `pos_embed` gives the noisy picture's tokens the places of a mixed layout. The text's places begin
where those of the largest picture end, so they are the ones that go with a picture of the layout's extent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.packed import PackedFamily
from fastdit.models.rotary import guided, rotary, shared

#: The area in pixels that editing pipelines choose where no size is asked for, and what its sides are multiples of.
_AREA, _MULTIPLE = 1024 * 1024, 32


@dataclasses.dataclass(frozen=True)
class QwenImageFamily(PackedFamily):
    """Tokens of Qwen-Image: 64 channels = 16 latent channels x 2 x 2 pixels.

    Editing pipelines append the tokens of pictures; the one at index `sample` decides the size if none is asked for.
    """

    sample: int | None = None

    one_frame: ClassVar[str | None] = "its transformer counts places from the picture's middle, undescribed"

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        image = arguments.get("image")
        picture = image[self.sample or 0] if isinstance(image, list) else image
        shape = getattr(picture, "size", None)
        if self.sample is None or not isinstance(shape, tuple):
            return super().size(pipeline, arguments)
        width = math.sqrt(_AREA * shape[0] / shape[1])
        height = width * shape[1] / shape[0]
        height, width = (round(side / _MULTIPLE) * _MULTIPLE for side in (height, width))
        return arguments.get("height") or height, arguments.get("width") or width

    def child_overrides(self, transformer: Any, layout: TokenLayout, latents: torch.Tensor) -> dict[str, Any]:
        if layout.whole:
            return {}
        return {"pos_embed": _PlacedRotary(transformer.pos_embed, layout, latents)}

    def _positions(
        self, arguments: Mapping[str, Any], appended: int, layout: TokenLayout, latents: torch.Tensor
    ) -> dict[str, Any]:
        # A strip for the model, which counts tokens by these sizes; `_PlacedRotary` knows the layout's extent.
        own = (1, *layout.extent) if layout.whole else (1, 1, layout.tokens)
        return {"img_shapes": [[own, *_sizes(sizes)[1:]] for sizes in arguments["img_shapes"]]}


class _PlacedRotary(nn.Module):
    """The model's rotary embedding with the first picture's tokens at the places of a layout."""

    def __init__(self, embed: Any, layout: TokenLayout, latents: torch.Tensor) -> None:
        super().__init__()
        # Kept out of the module tree: the child belongs to the user's model.
        self.__dict__["_embed"] = embed
        rows, columns = self._extent = layout.extent
        places = layout.positions(latents.device)
        if embed.scale_rope:
            places = places - places.new_tensor([rows - rows // 2, columns - columns // 2])
        frame = nn.functional.pad(places, (1, 0))
        self.__dict__["_table"] = guided(rotary(frame, embed.axes_dim, embed.theta), latents.shape[0])

    def forward(self, sizes: Any, *args: Any, **options: Any) -> tuple[Any, torch.Tensor]:
        table = self.__dict__["_table"]
        others = _sizes(sizes[0] if isinstance(sizes, list) else sizes)[1:]
        pictures, text = self.__dict__["_embed"]([[(1, *self._extent), *others]], *args, **options)
        appended = pictures[self._extent[0] * self._extent[1] :]
        return shared(torch.cat([table, appended.expand(len(table), -1, -1)], dim=1)), text


def _sizes(entry: Any) -> list[tuple[int, int, int]]:
    """List the sizes of one image's pictures; a single one may stand alone."""
    return list(entry) if isinstance(entry, list) else [entry]


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the mean and the deviation of every latent channel, [1, C, 1, 1, 1]."""
    mean, deviation = (
        like.new_tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return mean, deviation


def _decoded(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Decode frames whose channels are normalised one by one, with an autoencoder of videos."""
    mean, deviation = _statistics(vae, frames)
    latents = (frames[:, :, None] * deviation + mean).to(vae.dtype)
    pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0][:, :, 0]
    return pixels


def _encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels to frames whose channels are normalised one by one, with an autoencoder of videos."""
    latents: torch.Tensor = vae.encode(pixels[:, :, None].to(vae.dtype)).latent_dist.mode()
    mean, deviation = _statistics(vae, latents)
    return ((latents - mean) / deviation)[:, :, 0]


QWEN_IMAGE = QwenImageFamily(
    "Qwen-Image",
    ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    refused=(),
    decoding=_decoded,
    encoding=_encoded,
)
QWEN_IMAGE_EDIT = dataclasses.replace(QWEN_IMAGE, pipelines=("QwenImageEditPipeline",), sample=0)
QWEN_IMAGE_EDIT_PLUS = dataclasses.replace(QWEN_IMAGE, pipelines=("QwenImageEditPlusPipeline",), sample=-1)
