"""FLUX.1 and the models that took over its tokens: packed 2 x 2 latent patches with rotary position ids."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdit.models.family import PICTURE_ADAPTERS, Arguments, Pipeline
from fastdit.models.packed import PackedFamily

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class FluxFamily(PackedFamily):
    """Tokens of FLUX.1: 64 channels = 16 latent channels x 2 x 2 pixels, ids (0, row, column).

    Kontext appends the tokens of the picture that it edits, with ids (1, row, column).
    """

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        height, width = super().size(pipeline, arguments)
        if area := arguments.get("max_area"):
            # Kontext keeps the aspect ratio that was asked for and makes the area its own.
            aspect, multiple = width / height, pipeline.vae_scale_factor * 2
            width = round((area * aspect) ** 0.5) // multiple * multiple
            height = round((area / aspect) ** 0.5) // multiple * multiple
        return height, width

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        attention = arguments.get("joint_attention_kwargs") or {}
        if "ip_adapter_masks" in attention:
            return "joint_attention_kwargs['ip_adapter_masks'] is tied to one resolution; leave it out"
        return super().refusal(pipeline, arguments)


@dataclasses.dataclass(frozen=True)
class KontextInpaintFamily(FluxFamily):
    """Kontext's inpainting paints at the size of its picture, whatever size is asked for.

    That is the trained size of the nearest aspect ratio, or without `_auto_resize` the picture's own.
    """

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        from diffusers.pipelines.flux.pipeline_flux_kontext_inpaint import PREFERRED_KONTEXT_RESOLUTIONS

        image = arguments.get("image")
        if image is None:
            return super().size(pipeline, arguments)
        picture = image[0] if isinstance(image, list) else image
        height, width = pipeline.image_processor.get_default_height_width(picture)
        if arguments.get("_auto_resize", True):
            _, width, height = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        multiple = pipeline.vae_scale_factor * 2
        return height // multiple * multiple, width // multiple * multiple


@dataclasses.dataclass(frozen=True)
class FluxFillFamily(FluxFamily):
    """Tokens of FLUX.1 Fill: the latents' channels, then those of the masked picture, then the mask's.

    The mask has a channel for each of `side` x `side` pixels that make a latent one, which is the autoencoder's factor.
    """

    side: int = 8

    def of(self, pipeline: Pipeline) -> Self:
        return dataclasses.replace(self, side=int(pipeline.vae_scale_factor))

    def channels(self, given: int) -> int:
        return (given - self.patch**2 * self.side**2) // 2

    def halved(self, frames: torch.Tensor) -> torch.Tensor:
        split = frames.shape[1] - self.side**2
        mask = nn.functional.pixel_shuffle(frames[:, split:], self.side)
        pooled = nn.functional.avg_pool2d(frames[:, :split], 2)
        return torch.cat([pooled, nn.functional.pixel_unshuffle(super().halved(mask), self.side)], dim=1)


FLUX = FluxFamily(
    "FLUX.1",
    ("FluxPipeline", "FluxKontextPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
)
KONTEXT_INPAINT = KontextInpaintFamily("FLUX.1", ("FluxKontextInpaintPipeline",))
FLUX_FILL = FluxFillFamily("FLUX.1", ("FluxFillPipeline",), refused=(*PICTURE_ADAPTERS, "masked_image_latents"))
CHROMA = PackedFamily("Chroma", ("ChromaPipeline", "ChromaImg2ImgPipeline"))
OVIS_IMAGE = PackedFamily("Ovis-Image", ("OvisImagePipeline",))
LONGCAT_IMAGE = PackedFamily("LongCat-Image", ("LongCatImagePipeline",))
BRIA = PackedFamily("Bria", ("BriaPipeline",), cell=1)
FAMILIES = (FLUX, KONTEXT_INPAINT, FLUX_FILL, CHROMA, OVIS_IMAGE, LONGCAT_IMAGE, BRIA)
