"""The one table of tiny models: pipelines by their class's name, and transformers of which there is no whole pipeline.

`PIPELINES["FluxPipeline"](size=64, steps=4, batch=1)` gives a pipeline and the keyword arguments of one call,
`TRANSFORMERS["mochi"]()` a transformer and those of one forward.
"""

from __future__ import annotations

import math

import diffusers
import torch

from fastdit.testing.tiny import (
    Built,
    Call,
    Size,
    TinyPipeline,
    TinySibling,
    TinyTransformer,
    randn,
)

STEPS = 12


def _texts(batch: int, width: int, **more: object) -> Call:
    """Make embeddings of prompts and of negative prompts, six tokens each."""
    embeds = {
        "prompt_embeds": randn(batch, 6, width, seed=21),
        "negative_prompt_embeds": randn(batch, 6, width, seed=23),
    }
    return {**embeds, **more}


def _masked(batch: int, width: int, dtype: torch.dtype = torch.float32, **more: object) -> Call:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return _texts(batch, width, **{name: torch.ones(batch, 6, dtype=dtype) for name in names}, **more)


def _pooled(batch: int, width: int, **more: object) -> Call:
    pooled = {
        "pooled_prompt_embeds": randn(batch, width, seed=22),
        "negative_pooled_prompt_embeds": randn(batch, width, seed=24),
    }
    return _texts(batch, 32, **pooled, **more)


def _some_masked(call: Call, images: slice) -> Call:
    """Let the prompts of `images` be two tokens shorter."""
    call["prompt_attention_mask"][images, 4:] = 0
    return call


def _hunyuan_image(batch: int) -> Call:
    embeds = _texts(batch, 32)
    embeds |= {f"{name}_2": value for name, value in _texts(batch, 16).items()}
    return embeds | {name.replace("embeds", "embeds_mask"): torch.ones(batch, 6) for name in embeds}


def _guiders() -> Call:
    from diffusers.guiders import ClassifierFreeGuidance

    return {name: ClassifierFreeGuidance(guidance_scale=2.0) for name in ("guider", "ocr_guider")}


def _hidream(batch: int) -> Call:
    shapes = {
        "prompt_embeds_t5": (batch, 4, 32),
        "prompt_embeds_llama3": (2, batch, 4, 16),
        "pooled_prompt_embeds": (batch, 16),
    }
    return {
        f"{prefix}{name}": randn(*shape, seed=seed + index)
        for prefix, seed in (("", 21), ("negative_", 31))
        for index, (name, shape) in enumerate(shapes.items())
    } | {"guidance_scale": 2.0}


def _hidream_area(pipeline: diffusers.DiffusionPipeline, height: int, width: int) -> None:
    """The pipeline makes every picture's area that of a square of this side."""
    pipeline.default_sample_size = math.ceil((height * width) ** 0.5 / 8)


def _picture(batch: int, height: int, width: int) -> Call:
    return {"image": torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)), "strength": 1.0}


def _inpainted(batch: int, height: int, width: int) -> Call:
    mask = torch.zeros(batch, 1, height, width)
    mask[..., width // 2 :] = 1.0  # the left half is kept
    return _picture(batch, height, width) | {"mask_image": mask}


def _edited(batch: int, height: int, width: int) -> Call:
    picture = _picture(1, 64, 96)["image"]
    return {"image": picture, "_auto_resize": False, "max_area": height * width}


def _red_square(batch: int, height: int, width: int) -> Call:
    from PIL import Image

    negative = {"negative_prompt_embeds": randn(batch, 6, 32, seed=23), "guidance_scale": 2.0}
    return {"image": Image.new("RGB", (64, 64), (200, 30, 30)), **negative}


_SHIFTING = {"use_dynamic_shifting": True}

_FLUX = TinyPipeline(
    "FluxPipeline",
    "FluxTransformer2DModel",
    lambda batch: {"prompt_embeds": randn(batch, 6, 32, seed=21), "pooled_prompt_embeds": randn(batch, 32, seed=22)},
    scheduling=_SHIFTING,
    encoders=2,
)
_KONTEXT = TinySibling("FluxKontextPipeline", _FLUX, _edited)
# One embedding for all blocks, cut into rows; a mask over text and image.
_CHROMA = TinyPipeline(
    "ChromaPipeline",
    "ChromaTransformer2DModel",
    lambda batch: _some_masked(_masked(batch, 32, guidance_scale=2.0), slice(None)),
)
# Latents of 4 x 4 channels a token, position ids of four axes, one embedding stream.
_FLUX2 = TinyPipeline(
    "Flux2Pipeline",
    "Flux2Transformer2DModel",
    lambda batch: {"prompt_embeds": randn(batch, 6, 32, seed=21)},
    vae="AutoencoderKLFlux2",
    scheduling=_SHIFTING,
    token=4,
    side=16,
)
# True classifier-free guidance: two calls a step.
_QWEN = TinyPipeline(
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    lambda batch: {
        "prompt_embeds": randn(batch, 7, 16, seed=21),
        "prompt_embeds_mask": torch.ones(batch, 7, dtype=torch.int64),
        "negative_prompt_embeds": randn(batch, 5, 16, seed=23),
        "negative_prompt_embeds_mask": torch.ones(batch, 5, dtype=torch.int64),
        "true_cfg_scale": 2.0,
    },
    vae="AutoencoderKLQwenImage",
    scheduling={**_SHIFTING, "shift": 1.0},
    token=8,
    side=32,
)
# Joint blocks, the last without a text output; both branches in one batch.
_SD3 = TinyPipeline(
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    lambda batch: _pooled(batch, 32, guidance_scale=3.0),
    encoders=3,
)
# Lists of images and captions, refiners before the main blocks.
_Z_IMAGE = TinyPipeline(
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    lambda batch: {
        "prompt_embeds": [randn(6 - image, 16, seed=21 + 100 * image) for image in range(batch)],
        "negative_prompt_embeds": [randn(4, 16, seed=23 + 100 * image) for image in range(batch)],
        "guidance_scale": 2.0,
    },
    scheduling={"use_dynamic_shifting": False},
)
_FLUX_INPAINT = TinySibling("FluxInpaintPipeline", _FLUX, _inpainted)

PIPELINES: dict[str, TinyPipeline | TinySibling] = {
    row.name: row
    for row in (
        _FLUX,
        _KONTEXT,
        _CHROMA,
        TinyPipeline(
            "OvisImagePipeline",
            "OvisImageTransformer2DModel",
            lambda batch: _texts(batch, 32, guidance_scale=2.0, negative_prompt=None),
        ),
        TinyPipeline("BriaPipeline", "BriaTransformer2DModel", lambda batch: _texts(batch, 32, guidance_scale=2.0)),
        _FLUX2,
        TinySibling("Flux2KleinPipeline", _FLUX2, _red_square),
        _QWEN,
        _SD3,
        # Every latent pixel is a token; a guider calls the branches one by one.
        TinyPipeline(
            "HunyuanImagePipeline",
            "HunyuanImageTransformer2DModel",
            _hunyuan_image,
            vae="AutoencoderKLHunyuanImage",
            encoders=2,
            token=8,
            more_parts=_guiders,
        ),
        # Rotary indices spread over a fixed range.
        TinyPipeline(
            "CogView4Pipeline",
            "CogView4Transformer2DModel",
            lambda batch: _texts(batch, 32, guidance_scale=2.0),
            scheduling={**_SHIFTING, "base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256},
        ),
        # Text and image in one stream, refiners before it, prompts of different lengths.
        TinyPipeline(
            "Lumina2Pipeline",
            "Lumina2Transformer2DModel",
            lambda batch: _some_masked(_masked(batch, 16, torch.bool, guidance_scale=2.0), slice(-1, None)),
            scheduling=_SHIFTING,
        ),
        _Z_IMAGE,
        # Blocks inside wrappers, a mixture of experts, both branches in one batch.
        TinyPipeline(
            "HiDreamImagePipeline",
            "HiDreamImageTransformer2DModel",
            _hidream,
            scheduling=_SHIFTING,
            encoders=4,
            fit=_hidream_area,
        ),
        # Cross attention, a position buffer, a multistep DPM solver, both branches in one batch.
        TinyPipeline(
            "PixArtSigmaPipeline",
            "PixArtTransformer2DModel",
            lambda batch: _masked(batch, 32, guidance_scale=3.0, negative_prompt=None, use_resolution_binning=False),
            scheduler=diffusers.DPMSolverMultistepScheduler,
        ),
        # Five frames, a multistep scheduler, two calls a step.
        TinyPipeline(
            "WanPipeline",
            "WanTransformer3DModel",
            lambda batch: _texts(batch, 16, num_frames=5, guidance_scale=3.0),
            vae="AutoencoderKLWan",
            scheduler=diffusers.UniPCMultistepScheduler,
            scheduling={
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "num_train_timesteps": 1000,
                "flow_shift": 3.0,
            },
            side=32,
        ),
        # Five frames with true guidance: two calls a step.
        TinyPipeline(
            "HunyuanVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            lambda batch: _masked(batch, 32) | _pooled(batch, 8, num_frames=5, true_cfg_scale=2.0),
            vae="AutoencoderKLHunyuanVideo",
            encoders=2,
        ),
        # A learned table of positions, both branches in one batch.
        TinyPipeline(
            "AuraFlowPipeline", "AuraFlowTransformer2DModel", lambda batch: _masked(batch, 32, guidance_scale=3.0)
        ),
        # Linear attention, convolutions over the frame, an autoencoder without a distribution, a DPM solver.
        TinyPipeline(
            "SanaPipeline",
            "SanaTransformer2DModel",
            lambda batch: _masked(batch, 16, guidance_scale=3.0, negative_prompt=None, use_resolution_binning=False),
            vae="AutoencoderDC",
            scheduler=diffusers.DPMSolverMultistepScheduler,
            scheduling={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
        # The ids of a whole frame are made in the forward. Guided, the pipeline takes a single prompt.
        TinyPipeline(
            "PRXPipeline",
            "PRXTransformer2DModel",
            lambda batch: _masked(batch, 32, torch.bool, guidance_scale=1.0, use_resolution_binning=False),
        ),
        # Blocks that take the sequence first, both branches in one batch.
        TinyPipeline(
            "ErnieImagePipeline",
            "ErnieImageTransformer2DModel",
            lambda batch: _texts(batch, 16, guidance_scale=2.0),
            vae="AutoencoderKLFlux2",
            token=4,
            side=16,
        ),
        TinySibling("FluxImg2ImgPipeline", _FLUX, _picture),
        TinySibling("ChromaImg2ImgPipeline", _CHROMA, _picture),
        TinySibling("QwenImageImg2ImgPipeline", _QWEN, _picture),
        TinySibling("StableDiffusion3Img2ImgPipeline", _SD3, _picture),
        # The masked picture and the mask are joined with the latents, channel by channel.
        TinySibling(
            "FluxFillPipeline",
            _FLUX_INPAINT,
            _inpainted,
            {"transformer": {"in_channels": 16 + 16 + 256, "out_channels": 16}},
        ),
        TinySibling("FluxKontextInpaintPipeline", _KONTEXT, _inpainted),
        _FLUX_INPAINT,
        TinySibling("ZImageInpaintPipeline", _Z_IMAGE, _inpainted),
        TinySibling("QwenImageInpaintPipeline", _QWEN, _inpainted),
        TinySibling(
            "StableDiffusion3InpaintPipeline",
            _SD3,
            _inpainted,
            {"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}},
        ),
        TinySibling("ZImageImg2ImgPipeline", _Z_IMAGE, _picture),
    )
}


def tiny_flux(*, steps: int = STEPS, batch: int = 1, size: Size = 64) -> Built:
    """Make a FluxPipeline without text encoders and the keyword arguments of one call; 16 pixels are a token."""
    pipeline, call = _FLUX(size=size, steps=steps, batch=batch, output_type="latent")
    # Identifies the weights to accelerators that look for numbers measured on them; there are none.
    pipeline.transformer.register_to_config(_name_or_path="tiny-flux")
    generator = torch.Generator().manual_seed(21)
    call["prompt_embeds"] = torch.randn(batch, 6, 32, generator=generator)
    call["pooled_prompt_embeds"] = torch.randn(batch, 32, generator=generator)
    return pipeline, call


def _image(**more: object) -> Call:
    """Make the arguments of most forwards: 8 x 8 latents and six tokens of text."""
    return {
        "hidden_states": randn(1, 4, 8, 8, seed=31),
        "encoder_hidden_states": randn(1, 6, 32, seed=32),
        "timestep": torch.tensor([7.0]),
        **more,
    }


def _video(**more: object) -> Call:
    return _image(hidden_states=randn(1, 4, 2, 8, 8, seed=31), **more)


def _packed(**more: object) -> Call:
    """FLUX's relatives: packed tokens with position ids."""
    place = torch.arange(16)
    return {
        "hidden_states": randn(1, 16, 16, seed=31),
        "encoder_hidden_states": randn(1, 6, 32, seed=32),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.stack([torch.zeros(16), (place // 4).float(), (place % 4).float()], dim=1),
        "txt_ids": torch.zeros(6, 3),
        **more,
    }


def _placed(**more: object) -> Call:
    """CogView's relatives are told the picture's size."""
    return _image(target_size=torch.tensor([[8.0, 8.0]]), crop_coords=torch.zeros(1, 2), **more)


def _cogvideox() -> Call:
    return _image(hidden_states=randn(1, 2, 4, 8, 8, seed=31), timestep=torch.tensor([500]))


def _hunyuan_video() -> Call:
    text = {"encoder_attention_mask": torch.ones(1, 6), "pooled_projections": randn(1, 8, seed=33)}
    return _video(**text, guidance=torch.tensor([6000.0]))


def _lumina_next() -> Call:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(16, 32, 32)
    return _image(encoder_mask=torch.ones(1, 6), image_rotary_emb=rotary, cross_attention_kwargs={})


def _stable_audio() -> Call:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return {
        "hidden_states": randn(1, 4, 8, seed=31),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, 6, 16, seed=32),
        "global_hidden_states": randn(1, 1, 16, seed=33),
        "rotary_embedding": get_1d_rotary_pos_embed(8, 9, use_real=True, repeat_interleave_real=False),
    }


_NARROW = randn(1, 6, 16, seed=32)
_SIZE = torch.tensor([[8.0, 8.0]])

TRANSFORMERS: dict[str, TinyTransformer] = {
    "aura-flow": TinyTransformer("AuraFlowTransformer2DModel", _image),
    "bria": TinyTransformer("BriaTransformer2DModel", _packed),
    # Text features for each block.
    "bria-fibo": TinyTransformer(
        "BriaFiboTransformer2DModel", lambda: _packed(text_encoder_layers=[randn(1, 6, 16, seed=33) for _ in range(3)])
    ),
    "chroma": TinyTransformer(
        "ChromaTransformer2DModel", lambda: _packed(attention_mask=torch.ones(1, 22, dtype=torch.bool))
    ),
    "cogvideox": TinyTransformer("CogVideoXTransformer3DModel", _cogvideox),
    "cogview3-plus": TinyTransformer("CogView3PlusTransformer2DModel", lambda: _placed(original_size=_SIZE)),
    "cogview4": TinyTransformer(
        "CogView4Transformer2DModel", lambda: _placed(original_size=_SIZE), {"rope_axes_dim": (8, 8)}
    ),
    "consisid": TinyTransformer("ConsisIDTransformer3DModel", _cogvideox),
    "cosmos": TinyTransformer("CosmosTransformer3DModel", lambda: _video(fps=30)),
    "easy-animate": TinyTransformer("EasyAnimateTransformer3DModel", _video),
    # Tokens of a prior are added to the image's.
    "glm-image": TinyTransformer(
        "GlmImageTransformer2DModel",
        lambda: _placed(prior_token_id=torch.arange(16)[None], prior_token_drop=torch.zeros(1, 16, dtype=torch.bool)),
    ),
    # Blocks inside wrappers, a mixture of experts.
    "hidream": TinyTransformer(
        "HiDreamImageTransformer2DModel",
        lambda: {
            "hidden_states": randn(1, 4, 8, 8, seed=31),
            "timesteps": torch.tensor([7.0]),
            "encoder_hidden_states_t5": randn(1, 4, 32, seed=32),
            "encoder_hidden_states_llama3": randn(2, 1, 4, 16, seed=33),
            "pooled_embeds": randn(1, 16, seed=34),
        },
        {"num_layers": 1, "num_single_layers": 1, "max_resolution": (8, 8), "llama_layers": [0, 1]},
    ),
    "hunyuan-image": TinyTransformer(
        "HunyuanImageTransformer2DModel",
        lambda: _image(encoder_attention_mask=torch.ones(1, 6)),
        {"text_embed_2_dim": None},
    ),
    "hunyuan-video": TinyTransformer("HunyuanVideoTransformer3DModel", _hunyuan_video),
    # Two texts and no image.
    "hunyuan-video15": TinyTransformer(
        "HunyuanVideo15Transformer3DModel",
        lambda: _video(
            encoder_attention_mask=torch.ones(1, 6),
            encoder_hidden_states_2=randn(1, 4, 16, seed=33),
            encoder_attention_mask_2=torch.ones(1, 4),
            image_embeds=torch.zeros(1, 3, 16),
        ),
    ),
    # From a picture: the first frame has an embedding of its own.
    "hunyuan-video-token-replace": TinyTransformer(
        "HunyuanVideoTransformer3DModel", _hunyuan_video, {"image_condition_type": "token_replace"}
    ),
    "longcat-image": TinyTransformer("LongCatImageTransformer2DModel", _packed),
    # Packed video tokens.
    "ltx-video": TinyTransformer(
        "LTXVideoTransformer3DModel",
        lambda: {
            "hidden_states": randn(1, 32, 4, seed=31),
            "encoder_hidden_states": randn(1, 6, 16, seed=32),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": torch.ones(1, 6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    # Text and image in one stream, refiners before it.
    "lumina2": TinyTransformer(
        "Lumina2Transformer2DModel",
        lambda: _image(encoder_hidden_states=_NARROW, encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool)),
    ),
    "lumina-next": TinyTransformer("LuminaNextDiT2DModel", _lumina_next),
    "mochi": TinyTransformer(
        "MochiTransformer3DModel", lambda: _video(encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool))
    ),
    "ovis-image": TinyTransformer("OvisImageTransformer2DModel", _packed),
    "prx": TinyTransformer("PRXTransformer2DModel", lambda: _image(attention_mask=torch.ones(1, 6, dtype=torch.bool))),
    # Linear attention.
    "sana": TinyTransformer("SanaTransformer2DModel", lambda: _image(encoder_hidden_states=_NARROW)),
    # The time embedding is the first token.
    "stable-audio": TinyTransformer("StableAudioDiTModel", _stable_audio),
}
