"""Why a pipeline of diffusers can't take stages of mixed resolution: one sentence each, found in the class's own code.

Stages of whole frames need less of a pipeline than that (`fastdit.models.whole_frames`), and caches nothing of it.
"""

from __future__ import annotations

import inspect
import re
import typing
from weakref import WeakKeyDictionary

from fastdit.models.family import Pipeline

_FRAMES = "its tokens fill planes of several frames, and a token layout describes one plane"
_CODES = "it picks discrete codes and has no flow of latents to re-noise"
_SOUND = "it makes no picture, so its tokens have no rows and columns"

#: What was read of constructors. Weak, as a twin's class holds what is behind the twin.
_annotations: WeakKeyDictionary[type[Pipeline], dict[str, tuple[str, ...]]] = WeakKeyDictionary()

#: By the pipeline's class, where the class itself and not its transformer is the reason.
BY_PIPELINE: dict[str, str] = {
    "BriaFibo2Pipeline": "it makes the ids of image and gist tokens inside its forward, undescribed",
    "ChromaInpaintPipeline": "it asks its transformer for guidance_embeds, which that has not, so it can't be called",
    "Flux2KleinKVPipeline": "it keeps keys and values of the reference's tokens for the token count of its first step",
    "HunyuanImageRefinerPipeline": "it joins the latents with those of a picture of the full size at every step",
    "LongCatImageEditPipeline": "it appends a picture's tokens as FLUX.1 Kontext does, undescribed",
    "LuminaPipeline": "its loop gives a rotary table of a fixed grid, cropped to each frame",
    "PRXPixelPipeline": "it denoises pixels, of which no autoencoder gives a smaller picture",
    "QwenImageLayeredPipeline": "it denoises several layers at once, and a token layout describes one plane",
    "RFD4ProteinaPipeline": "it makes no picture, so its tokens have no rows and columns",
    "StableDiffusion3PAGImg2ImgPipeline": "its branch of perturbed attention has not been tried on mixed tokens",
    "StableDiffusion3PAGPipeline": "its branch of perturbed attention has not been tried on mixed tokens",
    "VisualClozeGenerationPipeline": "it joins the latents with masked channels of the full size at every step",
    "VisualClozePipeline": "it runs two pipelines that join the latents with masked channels of the full size",
    "ZImageOmniPipeline": "it gives the transformer lists of pictures with a noise mask over all their tokens",
}

#: By a part of the pipeline's name, in this order.
BY_KIND: dict[str, str] = {
    "ControlNet": "a ControlNet's residuals are added token by token, and it makes them for a whole frame",
    "Inpaint": "it appends or joins a picture beside the mask that its loop blends with, undescribed",
    "Control": "its loop joins the latents with a control picture's channels of the full size at every step",
}

#: By the transformer's class.
BY_TRANSFORMER: dict[str, str] = {
    "AceStepTransformer1DModel": _SOUND,
    "AuraFlowTransformer2DModel": "it adds a learned table of positions, which has nothing between two tokens",
    "BriaFiboTransformer2DModel": "it hides a mask over a whole frame's tokens among the attention's arguments",
    "ErnieImageTransformer2DModel": "its patch embedding takes whole frames and its ids are made for them, undescribed",
    "GlmImageTransformer2DModel": "it adds a prior's token to every image token of a whole frame",
    "Ideogram4Transformer2DModel": "its pipeline packs text and image in one sequence with ids of its own, undescribed",
    "JoyImageEditTransformer3DModel": _FRAMES,
    "JoyImageEditPlusTransformer3DModel": _FRAMES,
    "Krea2Transformer2DModel": "its pipeline gives ids of text and image in one sequence, undescribed",
    "LongCatAudioDiTTransformer": _SOUND,
    "NucleusMoEImageTransformer2DModel": "it makes places of the pictures' sizes as Qwen-Image does, undescribed",
    "OmniGenTransformer2DModel": "its pipeline makes a square attention mask and ids over text and a whole frame",
    "PRXTransformer2DModel": "it makes the ids of a whole frame inside its forward, undescribed",
    "QwenImage21Transformer2DModel": "it keeps keys and values of its conditions from step to step, undescribed",
    "SanaTransformer2DModel": "its feed-forward layers convolve over rows and columns, which mixed tokens don't have",
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "Transformer2DModel": _CODES,
    "UVit2DModel": _CODES,
}


#: What stands in the way of mixed stages alone, and of whole frames only as far as nobody has described them.
_OF_MIXED_STAGES = (
    _FRAMES,
    *(BY_TRANSFORMER[f"{name}Transformer2DModel"] for name in ("AuraFlow", "BriaFibo", "ErnieImage", "PRX", "Sana")),
)


def why_not_whole(pipeline: type[Pipeline]) -> str:
    """Say in one sentence why pipelines of a class that no family describes can't take stages of whole frames."""
    schedulers, reason = annotated(pipeline, "scheduler"), why_not(pipeline)
    if reason not in _OF_MIXED_STAGES:
        return reason
    return _no_flow(schedulers) or "no family describes in what shape its latents travel, undescribed"


def why_not(pipeline: type[Pipeline]) -> str:
    """Say in one sentence why pipelines of a class that no family describes can't take mixed stages."""
    if reason := BY_PIPELINE.get(pipeline.__name__):
        return reason
    transformers, schedulers = annotated(pipeline, "transformer"), annotated(pipeline, "scheduler")
    if reason := next((BY_TRANSFORMER[name] for name in transformers if name in BY_TRANSFORMER), None):
        return reason
    if any("3D" in name for name in transformers):
        return _FRAMES
    if reason := next((reason for kind, reason in BY_KIND.items() if kind in pipeline.__name__), None):
        return reason
    return _no_flow(schedulers) or "no family describes how it lays its tokens out"


def _no_flow(schedulers: tuple[str, ...]) -> str | None:
    if not schedulers or any("FlowMatch" in name for name in schedulers):
        return None
    return f"RALU re-noises along a flow, and {schedulers[0]} is no flow-matching scheduler"


def annotated(pipeline: type[Pipeline], part: str) -> tuple[str, ...]:
    """Name the classes that a pipeline's constructor declares for a part, None left out."""
    known = _annotations.setdefault(pipeline, {})
    if part not in known:
        known[part] = _annotated(pipeline, part)
    return known[part]


def _annotated(pipeline: type[Pipeline], part: str) -> tuple[str, ...]:
    parameter = inspect.signature(pipeline.__init__).parameters.get(part)
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return ()
    if isinstance(parameter.annotation, str):
        names = re.findall(r"\w+", parameter.annotation)
    else:
        names = [kind.__name__ for kind in typing.get_args(parameter.annotation) or (parameter.annotation,)]
    return tuple(name for name in names if name not in ("None", "NoneType", "Optional", "Union"))
