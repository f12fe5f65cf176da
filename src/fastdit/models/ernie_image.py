"""ERNIE-Image: a token is a pixel of FLUX.2's normalised latents; the ids of a whole frame are made in the forward."""

from __future__ import annotations

import dataclasses
from functools import partial

from fastdit.models.family import Pipeline
from fastdit.models.flux2 import decoded_tokens, encoded_tokens
from fastdit.models.whole_frames import WholeFrameFamily

#: Written in the pipeline, beside the autoencoder's own.
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ErnieImageFamily(WholeFrameFamily):
    """Frames [B, 128, H / 16, W / 16] of FLUX.2's autoencoder: 128 = 32 latent channels x 2 x 2 pixels."""

    def default_side(self, pipeline: Pipeline) -> int:
        return 1024  # the call's own default, which no configuration holds

    def pipeline_overrides(self) -> tuple[str, ...]:
        return ()  # its loop always comes to its end


ERNIE_IMAGE = ErnieImageFamily(
    "ERNIE-Image",
    ("ErnieImagePipeline",),
    decoding=partial(decoded_tokens, epsilon=_EPSILON),
    encoding=partial(encoded_tokens, epsilon=_EPSILON),
)
FAMILIES = (ERNIE_IMAGE,)
