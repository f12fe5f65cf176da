"""Tiny pipelines whose loop is not one walk along one scheduler's timesteps, or whose blocks get more than a stream.

`UNUSUAL["GlmImagePipeline"]()` gives a pipeline and the keyword arguments of one call, as `PIPELINES` does.
"""

from __future__ import annotations

import diffusers
import torch

from fastdit.testing.models import PIPELINES
from fastdit.testing.tiny import Call, TinyPipeline, TinySibling, component, randn, seed_weights


def _texts(batch: int, tokens: int, width: int, **more: object) -> Call:
    embeds = randn(2, batch, tokens, width, seed=21)
    return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], **more}


def _sound_and_picture(batch: int) -> Call:
    masks = dict.fromkeys(
        ("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(batch, 8, dtype=torch.long)
    )
    scales = {"guidance_scale": 2.0, "audio_guidance_scale": 2.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    off = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    sizes = {"num_frames": 5, "frame_rate": 25.0, "output_type": "latent"}  # there is no vocoder
    return _texts(batch, 8, 32, **masks, **scales, **off, **sizes)


def _sound_parts() -> Call:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    sides = {
        f"{side}_connector_{name}": value
        for side in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 2),
            ("attention_head_dim", 8),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        **sides,
    ).eval()
    seed_weights(connectors, 3)
    return {"connectors": connectors, "audio_vae": component("AutoencoderKLLTX2Audio"), "vocoder": None}


def _sections(batch: int) -> Call:
    return {
        "image": torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
        "prompt_embeds": randn(batch, 6, 32, seed=21),
        "pooled_prompt_embeds": randn(batch, 8, seed=22),
        "prompt_attention_mask": torch.ones(batch, 6),
        "num_frames": 17,
        "latent_window_size": 3,
    }


def _picture_parts() -> Call:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    configuration = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    encoder = SiglipVisionModel(configuration).eval()
    seed_weights(encoder, 4)
    return {"image_encoder": encoder, "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32})}


def _edited_picture(batch: int, height: int, width: int) -> Call:
    from PIL import Image

    picture = Image.new("RGB", (width, height), (200, 30, 30))
    codes = torch.randint(0, 16, (batch + 1, 16), generator=torch.Generator().manual_seed(5))
    return {
        "image": [picture] if batch == 1 else [[picture]] * batch,
        "prior_token_ids": codes[:batch],
        "prior_token_image_ids": [codes[-1]] * batch,
        "source_image_grid_thw": [torch.tensor([[1, 4, 4]])] * batch,
    }


def _controlled(batch: int, height: int, width: int) -> Call:
    return {"control_image": torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))}


_ROWS: tuple[TinyPipeline | TinySibling, ...] = (
    # Sound and picture have a scheduler each, which step one after the other.
    TinyPipeline(
        "LTX2Pipeline",
        "LTX2VideoTransformer3DModel",
        _sound_and_picture,
        vae="AutoencoderKLLTX2Video",
        token=2,
        side=32,
        more_parts=_sound_parts,
    ),
    # Two sections of a video, a loop for each.
    TinyPipeline(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        _sections,
        vae="AutoencoderKLHunyuanVideo",
        encoders=2,
        side=32,
        more_parts=_picture_parts,
    ),
    # The picture to edit goes through the transformer before the loop.
    TinySibling(
        "GlmImagePipeline",
        TinyPipeline(
            "GlmImagePipeline",
            "GlmImageTransformer2DModel",
            lambda batch: _texts(batch, 6, 32, guidance_scale=2.0),
            scheduling={"use_dynamic_shifting": True},
            more_parts=lambda: {"processor": None, "vision_language_encoder": None},
        ),
        _edited_picture,
        {"vae": {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}},
    ),
    # Each frame has a scheduler of its own; two windows, of a loop each.
    TinyPipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2Transformer3DModel",
        lambda batch: _texts(
            batch, 6, 16, prompt=None, num_frames=13, base_num_frames=9, overlap_history=5, guidance_scale=2.0
        ),
        vae="AutoencoderKLWan",
        scheduler=diffusers.UniPCMultistepScheduler,
        scheduling={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        side=32,
    ),
    # A loop for each chunk of frames, and a forward after it, which keeps the chunk's keys and values.
    TinyPipeline(
        "AnyFlowFARPipeline",
        "AnyFlowFARTransformer3DModel",
        lambda batch: _texts(batch, 6, 16, num_frames=9, guidance_scale=2.0, chunk_partition=[1, 1, 1]),
        vae="AutoencoderKLWan",
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(),
        side=32,
    ),
    # A ControlNet's residuals are added between the blocks.
    *(
        TinySibling(f"{name}ControlNetPipeline", PIPELINES[f"{name}Pipeline"], _controlled, controlnet=controlnet)
        for name, controlnet in (
            ("Flux", "FluxControlNetModel"),
            ("QwenImage", "QwenImageControlNetModel"),
            ("StableDiffusion3", "SD3ControlNetModel"),
        )
    ),
)

UNUSUAL = {row.name: row for row in _ROWS}
