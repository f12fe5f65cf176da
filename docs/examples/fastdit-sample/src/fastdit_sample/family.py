"""A model family: EasyAnimate, whose videos take stages of whole frames."""

from __future__ import annotations

import dataclasses

from diffusers import DiffusionPipeline

from fastdit.models.whole_frames import VideoFamily


@dataclasses.dataclass(frozen=True)
class EasyAnimateFamily(VideoFamily):
    """Videos [B, C, F, h, w]; the pipeline has a name of its own for the pixels on a side of a latent one."""

    def token_side(self, pipeline: DiffusionPipeline) -> int:
        return int(pipeline.vae_spatial_compression_ratio * self.patch)


EASY_ANIMATE = EasyAnimateFamily("EasyAnimate", ("EasyAnimatePipeline",))
