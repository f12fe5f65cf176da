"""Qwen-Image: packed tokens whose positions the model makes of the pictures' sizes, counted from their middle.

The structural twin's `pos_embed` gives the noisy picture's tokens the places of a mixed layout. The text's places begin
where those of the largest picture end, so they are the ones that go with a picture of the layout's extent.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.autoencoders import decoded_planes, encoded_planes
from fastdit.models.family import Arguments, Autoencoder, Children, Pipeline, Transformer
from fastdit.models.packed import PackedFamily
from fastdit.models.rotary import PerImageTable, guided, rotary, shared

#: The area in pixels that editing pipelines choose where no size is asked for, and what its sides are multiples of.
_AREA, _MULTIPLE = 1024 * 1024, 32


#: A picture's frames, rows and columns; those of an image's pictures, or of one alone; those of a batch.
Size = tuple[int, int, int]
Sizes = Size | list[Size] | list[list[Size]]


@dataclasses.dataclass(frozen=True)
class QwenImageFamily(PackedFamily):
    """Tokens of Qwen-Image: 64 channels = 16 latent channels x 2 x 2 pixels.

    Editing pipelines append the tokens of pictures; the one at index `sample` decides the size if none is asked for.
    """

    sample: int | None = None

    one_frame: ClassVar[str | None] = "its transformer counts places from the picture's middle, undescribed"

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        image = arguments.get("image")
        picture = image[self.sample or 0] if isinstance(image, list) else image
        shape = getattr(picture, "size", None)
        if self.sample is None or not isinstance(shape, tuple):
            return super().size(pipeline, arguments)
        width = math.sqrt(_AREA * shape[0] / shape[1])
        height = width * shape[1] / shape[0]
        height, width = (round(side / _MULTIPLE) * _MULTIPLE for side in (height, width))
        return arguments.get("height") or height, arguments.get("width") or width

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.whole:
            return {}
        return {"pos_embed": _PlacedRotary(transformer.pos_embed, layout, latents)}

    def _positions(self, arguments: Arguments, appended: int, layout: TokenLayout, latents: torch.Tensor) -> Arguments:
        # A strip for the model, which counts tokens by these sizes; `_PlacedRotary` knows the layout's extent.
        own = (1, *layout.extent) if layout.whole else (1, 1, layout.tokens)
        return {"img_shapes": [[own, *_sizes(sizes)[1:]] for sizes in arguments["img_shapes"]]}


class _PlacedRotary(nn.Module):
    """The model's rotary embedding with the first picture's tokens at the places of a layout."""

    def __init__(self, embed: Transformer, layout: TokenLayout, latents: torch.Tensor) -> None:
        super().__init__()
        # Kept out of the module tree: the child belongs to the user's model.
        self.__dict__["_embed"] = embed
        rows, columns = self._extent = layout.extent
        places = layout.positions(latents.device)
        if embed.scale_rope:
            places = places - places.new_tensor([rows - rows // 2, columns - columns // 2])
        frame = nn.functional.pad(places, (1, 0))
        self.__dict__["_table"] = guided(rotary(frame, embed.axes_dim, embed.theta), latents.shape[0])

    def forward(
        self, sizes: Sizes, *args: object, **options: object
    ) -> tuple[torch.Tensor | PerImageTable, torch.Tensor]:
        table = self.__dict__["_table"]
        others = _sizes(sizes[0] if isinstance(sizes, list) else sizes)[1:]
        pictures, text = self.__dict__["_embed"]([[(1, *self._extent), *others]], *args, **options)
        appended = pictures[self._extent[0] * self._extent[1] :]
        return shared(torch.cat([table, appended.expand(len(table), -1, -1)], dim=1)), text


def _sizes(entry: Size | list[Size]) -> list[Size]:
    """List the sizes of one image's pictures; a single one may stand alone."""
    return list(entry) if isinstance(entry, list) else [entry]


def _decoded(vae: Autoencoder, frames: torch.Tensor) -> torch.Tensor:
    """Decode frames with an autoencoder of videos, as the only plane of one."""
    return decoded_planes(vae, frames[:, :, None])[:, :, 0]


def _encoded(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Undo `_decoded`."""
    return encoded_planes(vae, pixels[:, :, None])[:, :, 0]


QWEN_IMAGE = QwenImageFamily(
    "Qwen-Image",
    ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    refused=(),
    decoding=_decoded,
    encoding=_encoded,
)
QWEN_IMAGE_EDIT = dataclasses.replace(QWEN_IMAGE, pipelines=("QwenImageEditPipeline",), sample=0)
QWEN_IMAGE_EDIT_PLUS = dataclasses.replace(QWEN_IMAGE, pipelines=("QwenImageEditPlusPipeline",), sample=-1)
FAMILIES = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS)
