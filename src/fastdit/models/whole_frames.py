"""Families whose stages are whole frames: a frame of half the height and width is one that the model takes as it is.

Nothing of the model is replaced, so convolutions over rows and columns, learned tables of positions and several frames
in one sequence are no obstacle. A video is resized plane by plane: a token stands for its place in every plane, its
channels those of all of them in turn.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, ClassVar

import torch

from fastdit.layout import TokenLayout
from fastdit.models.autoencoders import at_hand, decoded_planes, encoded_planes
from fastdit.models.family import Arguments, Pipeline, Transformer
from fastdit.models.frames import FrameFamily

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class WholeFrameFamily(FrameFamily):
    """Pictures [B, C, h, w]. The patch is the transformer's own."""

    mixes: ClassVar[bool] = False

    def of(self, pipeline: Pipeline) -> Self:
        patch = _transformer(pipeline).config.patch_size
        return dataclasses.replace(self, patch=patch if isinstance(patch, int) else patch[-1])


@dataclasses.dataclass(frozen=True)
class AuraFlowFamily(WholeFrameFamily):
    """AuraFlow: the middle of a learned table of positions, whatever the frame's size."""

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        most = int(pipeline.transformer.config.pos_embed_max_size**0.5)
        return super().refusal(pipeline, arguments) or self.too_large(pipeline, arguments, most)


@dataclasses.dataclass(frozen=True)
class BinnedFamily(WholeFrameFamily):
    """Pipelines that make a picture of the nearest size in a list and crop it to the size that was asked for."""

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        height, width = super().size(pipeline, arguments)
        if not arguments.get("use_resolution_binning"):
            return height, width
        ratios = self.bins(pipeline)
        if ratios is None:
            return height, width  # the pipeline itself refuses the call
        found: tuple[int, int] = pipeline.image_processor.classify_height_width_bin(height, width, ratios=ratios)
        return found

    def bins(self, pipeline: Pipeline) -> dict[str, list[float]] | None:
        """Give the pipeline's list of sizes by aspect ratio."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SanaFamily(BinnedFamily):
    """Sana: one latent pixel a token."""

    def bins(self, pipeline: Pipeline) -> dict[str, list[float]] | None:
        from diffusers.pipelines.sana import pipeline_sana

        side = 32 * pipeline.transformer.config.sample_size
        found: dict[str, list[float]] | None = getattr(pipeline_sana, f"ASPECT_RATIO_{side}_BIN", None)
        return found


@dataclasses.dataclass(frozen=True)
class PRXFamily(BinnedFamily):
    """PRX: the ids of a whole frame are made inside its forward."""

    def default_side(self, pipeline: Pipeline) -> int:
        return int(pipeline.get_default_resolution())

    def bins(self, pipeline: Pipeline) -> dict[str, list[float]] | None:
        from diffusers.pipelines.prx import pipeline_prx

        found: dict[str, list[float]] | None = pipeline_prx.ASPECT_RATIO_BINS.get(pipeline.default_sample_size)
        return found


@dataclasses.dataclass(frozen=True)
class VideoFamily(WholeFrameFamily):
    """Videos [B, C, F, h, w] of `channels` = C latent channels, which come from the pipeline's transformer."""

    channels: int = 0
    one_plane: ClassVar[bool] = False

    def of(self, pipeline: Pipeline) -> Self:
        channels = int(_transformer(pipeline).config.in_channels)
        return dataclasses.replace(self, patch=super().of(pipeline).patch, channels=channels)

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        latents = arguments.get("latents")
        if isinstance(latents, torch.Tensor) and latents.dim() == 5:
            factor = pipeline.vae_scale_factor_spatial
            return latents.shape[3] * factor, latents.shape[4] * factor
        described = next(cls for cls in type(pipeline).__mro__ if cls.__name__ in self.pipelines)
        defaults = inspect.signature(described.__call__).parameters
        height, width = (arguments.get(name) or defaults[name].default for name in ("height", "width"))
        return height, width

    def token_side(self, pipeline: Pipeline) -> int:
        return int(pipeline.vae_scale_factor_spatial * self.patch)

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        latents = arguments.get("latents")
        if latents is not None and (latents.dim() != 5 or any(side % self.patch for side in latents.shape[3:])):
            return (
                f"latents of shape {tuple(latents.shape)} are not videos [B, C, F, h, w] whose sides are multiples of "
                f"{self.patch}; reshape them"
            )
        if getattr(pipeline.config, "expand_timesteps", False):
            return "the pipeline gives every token of a whole frame a timestep of its own; drop the schedule"
        return None

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return super().tokens(latents.flatten(1, 2))

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return self._planes(super().latents(tokens, layout))

    def decode(self, pipeline: Pipeline, frames: torch.Tensor) -> torch.Tensor:
        return decoded_planes(at_hand(pipeline.vae), self._planes(frames)).flatten(1, 2)

    def encode(self, pipeline: Pipeline, pixels: torch.Tensor) -> torch.Tensor:
        return encoded_planes(at_hand(pipeline.vae), pixels.unflatten(1, (3, -1))).flatten(1, 2)

    def _planes(self, frames: torch.Tensor) -> torch.Tensor:
        planes: torch.Tensor = frames.unflatten(1, (self.channels, -1))
        return planes


def _transformer(pipeline: Pipeline) -> Transformer:
    """Give a pipeline's transformer; Wan 2.2 may have the second of its two alone."""
    return pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2


AURA_FLOW = AuraFlowFamily("AuraFlow", ("AuraFlowPipeline",))
SANA = SanaFamily("Sana", ("SanaPipeline",))
PRX = PRXFamily("PRX", ("PRXPipeline",))
WAN = VideoFamily("Wan", ("WanPipeline",))
HUNYUAN_VIDEO = VideoFamily("HunyuanVideo", ("HunyuanVideoPipeline",))
FAMILIES = (AURA_FLOW, SANA, PRX, WAN, HUNYUAN_VIDEO)
