"""Pipelines of the installed diffusers out of its real classes, with seeded random weights, thousands of times smaller.

Each builder gives a pipeline without text encoders and the keyword arguments of one call, which holds embeddings of
prompts. `size` is (height, width) in pixels, or the side of a square, `batch` the number of prompts. Nothing is
downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn

from fastdit.errors import UnsupportedModel
from fastdit.testing.contract import flux_transformer, kl_autoencoder, seed_weights

Call = dict[str, Any]
Built = tuple[Any, Call]
Size = int | tuple[int, int]
Builder = Callable[..., Built]

_HEADS: Call = {"num_attention_heads": 2, "attention_head_dim": 16}

#: What these models are made of, here and where only a transformer is needed.
AURA_FLOW: Call = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "out_channels": 4,
    "pos_embed_max_size": 256,
    **_HEADS,
}
SANA: Call = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "sample_size": 8,
    **_HEADS,
}
PRX: Call = {
    "in_channels": 4,
    "context_in_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [8, 8],
}
HUNYUAN_VIDEO: Call = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 32,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "guidance_embeds": True,
    **_HEADS,
}


def randn(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal noise of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def component(name: str, seed: int = 0, **config: Any) -> Any:
    """Make a model of diffusers by its class's name. Raises `UnsupportedModel` where the installed version has none."""
    if not hasattr(diffusers, name):
        raise UnsupportedModel(f"diffusers {diffusers.__version__} has no {name}; install a version that has it")
    model: nn.Module = getattr(diffusers, name)(**config).eval()
    seed_weights(model, seed)
    return model


def flow_matching(**config: Any) -> Any:
    """Make the scheduler that most of the pipelines have."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def assembled(name: str, absent: Iterable[str] = ("text_encoder", "tokenizer"), **parts: Any) -> Any:
    """Make a pipeline of diffusers by its class's name, without the parts in `absent`."""
    if not hasattr(diffusers, name):
        raise UnsupportedModel(f"diffusers {diffusers.__version__} has no {name}; install a version that has it")
    pipeline = getattr(diffusers, name)(**dict.fromkeys(absent), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _call(size: Size, steps: int, **arguments: Any) -> Call:
    height, width = _sides(size)
    return {"height": height, "width": width, "num_inference_steps": steps, "output_type": "pt", **arguments}


def _numbered(*names: str, last: int = 2) -> list[str]:
    return [f"{name}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, last + 1))) for name in names]


def flux(*, size: Size = 64, steps: int = 4, batch: int = 1, guidance: bool = True, **weights: Any) -> Built:
    """FLUX.1; without `guidance` as in schnell, which is distilled to four steps."""
    pipeline = assembled(
        "FluxPipeline",
        _numbered("text_encoder", "tokenizer"),
        scheduler=flow_matching(use_dynamic_shifting=guidance),
        vae=kl_autoencoder(),
        transformer=flux_transformer(guidance=guidance, **weights),
    )
    embeds = {"prompt_embeds": randn(batch, 6, 32, seed=21), "pooled_prompt_embeds": randn(batch, 32, seed=22)}
    return pipeline, _call(size, steps, **embeds)


def _flux_sibling(name: str, size: Size, steps: int, batch: int, **arguments: Any) -> Built:
    pipeline, call = flux(size=size, steps=steps, batch=batch)
    return assembled(name, (), **pipeline.components), {**call, **arguments}


def flux_kontext(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """FLUX.1 Kontext with a picture to edit."""
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    area = {"_auto_resize": False, "max_area": math.prod(_sides(size))}
    return _flux_sibling("FluxKontextPipeline", size, steps, batch, image=picture, **area)


def from_picture(name: str, base: Builder) -> Builder:
    """Give the builder of a pipeline that begins with pictures of the parts of a text-to-image one."""

    def build(*, size: Size = 64, batch: int = 1, strength: float = 1.0, **options: Any) -> Built:
        pipeline, call = base(size=size, batch=batch, **options)
        pictures = torch.rand(batch, 3, *_sides(size), generator=torch.Generator().manual_seed(3))
        call |= {"image": pictures, "strength": strength}
        if "Inpaint" in name:
            # The left half is kept.
            mask = torch.zeros(batch, 1, *_sides(size))
            mask[..., _sides(size)[1] // 2 :] = 1.0
            call["mask_image"] = mask
        return assembled(name, (), **pipeline.components), call

    return build


def flux_fill(*, size: Size = 64, batch: int = 1, strength: float = 1.0, **options: Any) -> Built:
    """FLUX.1 Fill: the masked picture and the mask are joined with the latents, channel by channel."""
    pipeline, call = from_picture("FluxInpaintPipeline", flux)(size=size, batch=batch, strength=strength, **options)
    transformer = component(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=16 + 16 + 256,
        out_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **_HEADS,
    )
    absent = [name for name in pipeline.components if name in ("image_encoder", "feature_extractor")]
    parts = {name: part for name, part in pipeline.components.items() if name not in absent}
    return assembled("FluxFillPipeline", (), **{**parts, "transformer": transformer}), call


def _relative(name: str, transformer: str, size: Size, steps: int, batch: int, parts: Call, **config: Any) -> Built:
    """Make a relative of FLUX.1, with two branches."""
    model = component(
        transformer,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        joint_attention_dim=32,
        **{"patch_size": 1, "axes_dims_rope": (4, 6, 6), **_HEADS, **config},
    )
    pipeline = assembled(name, transformer=model, **parts)
    embeds = {"prompt_embeds": randn(batch, 6, 32, seed=21), "negative_prompt_embeds": randn(batch, 6, 32, seed=23)}
    return pipeline, _call(size, steps, **embeds, guidance_scale=2.0)


def chroma(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Chroma: one embedding for all blocks, cut into rows; a mask over text and image."""
    config = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    parts = {"scheduler": flow_matching(), "vae": kl_autoencoder()}
    pipeline, call = _relative("ChromaPipeline", "ChromaTransformer2DModel", size, steps, batch, parts, **config)
    mask = torch.ones(batch, 6)
    mask[:, 4:] = 0
    return pipeline, call | {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones(batch, 6)}


def ovis_image(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Ovis-Image."""
    parts = {"scheduler": flow_matching(), "vae": kl_autoencoder()}
    config = {"out_channels": 16}
    pipeline, call = _relative("OvisImagePipeline", "OvisImageTransformer2DModel", size, steps, batch, parts, **config)
    return pipeline, call | {"negative_prompt": None}


def bria(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Bria 3."""
    parts = {"scheduler": flow_matching(), "vae": kl_autoencoder()}
    return _relative("BriaPipeline", "BriaTransformer2DModel", size, steps, batch, parts)


def flux2(*, size: Size = 16, steps: int = 4, batch: int = 1) -> Built:
    """FLUX.2: latents of 4 x 4 channels a token, position ids of four axes, one embedding stream."""
    transformer = component(
        "Flux2Transformer2DModel",
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **_HEADS,
    )
    vae = component(
        "AutoencoderKLFlux2",
        seed=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )
    scheduler = flow_matching(use_dynamic_shifting=True)
    pipeline = assembled("Flux2Pipeline", scheduler=scheduler, vae=vae, transformer=transformer)
    return pipeline, _call(size, steps, prompt_embeds=randn(batch, 6, 32, seed=21))


def flux2_klein(*, size: Size = 16, steps: int = 4, batch: int = 1) -> Built:
    """FLUX.2 Klein with a picture to edit; two calls a step."""
    from PIL import Image

    pipeline, call = flux2(size=size, steps=steps, batch=batch)
    negative = {"negative_prompt_embeds": randn(batch, 6, 32, seed=23), "guidance_scale": 2.0}
    picture = {"image": Image.new("RGB", (64, 64), (200, 30, 30))}
    return assembled("Flux2KleinPipeline", (), **pipeline.components), {**call, **negative, **picture}


def qwen_image(*, size: Size = 32, steps: int = 4, batch: int = 1) -> Built:
    """Qwen-Image with true classifier-free guidance: two calls a step."""
    transformer = component(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **_HEADS,
    )
    vae = component(
        "AutoencoderKLQwenImage",
        seed=1,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = flow_matching(use_dynamic_shifting=True, shift=1.0)
    pipeline = assembled("QwenImagePipeline", scheduler=scheduler, vae=vae, transformer=transformer)
    return pipeline, _call(
        size,
        steps,
        prompt_embeds=randn(batch, 7, 16, seed=21),
        prompt_embeds_mask=torch.ones(batch, 7, dtype=torch.int64),
        negative_prompt_embeds=randn(batch, 5, 16, seed=23),
        negative_prompt_embeds_mask=torch.ones(batch, 5, dtype=torch.int64),
        true_cfg_scale=2.0,
    )


def sd3(
    *,
    size: Size = 64,
    steps: int = 4,
    batch: int = 1,
    three_five: bool = False,
    positions: int = 16,
    channels: int = 4,
) -> Built:
    """Stable Diffusion 3: joint blocks, the last without a text output; both branches in one batch.

    `three_five` adds what 3.5 has: a second attention in some blocks, normed queries and keys.
    """
    transformer = component(
        "SD3Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=positions,
        dual_attention_layers=(0, 1) if three_five else (),
        qk_norm="rms_norm" if three_five else None,
        **_HEADS,
    )
    pipeline = assembled(
        "StableDiffusion3Pipeline",
        _numbered("text_encoder", "tokenizer", last=3),
        transformer=transformer,
        scheduler=flow_matching(),
        vae=kl_autoencoder(latent_channels=channels),
    )
    return pipeline, _call(
        size,
        steps,
        prompt_embeds=randn(batch, 6, 32, seed=21),
        pooled_prompt_embeds=randn(batch, 32, seed=22),
        negative_prompt_embeds=randn(batch, 6, 32, seed=23),
        negative_pooled_prompt_embeds=randn(batch, 32, seed=24),
        guidance_scale=3.0,
    )


def hunyuan_image(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """HunyuanImage 2.1: every latent pixel is a token; a guider calls the branches one by one."""
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = component(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
        **_HEADS,
    )
    vae = component(
        "AutoencoderKLHunyuanImage",
        seed=1,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.75,
    )
    pipeline = assembled(
        "HunyuanImagePipeline",
        _numbered("text_encoder", "tokenizer"),
        scheduler=flow_matching(),
        vae=vae,
        transformer=transformer,
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
        ocr_guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )
    embeds = {
        f"{prefix}prompt_embeds{suffix}": randn(batch, 6, width, seed=seed)
        for prefix, seed in (("", 21), ("negative_", 23))
        for suffix, width in (("", 32), ("_2", 16))
    }
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(batch, 6) for name in embeds}
    return pipeline, _call(size, steps, **embeds, **masks)


def cogview4(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """CogView4: rotary indices spread over a fixed range."""
    transformer = component(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        pos_embed_max_size=8,
        rope_axes_dim=(64, 64),
        **_HEADS,
    )
    scheduler = flow_matching(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256)
    pipeline = assembled("CogView4Pipeline", scheduler=scheduler, vae=kl_autoencoder(), transformer=transformer)
    embeds = {"prompt_embeds": randn(batch, 6, 32, seed=21), "negative_prompt_embeds": randn(batch, 6, 32, seed=23)}
    return pipeline, _call(size, steps, **embeds, guidance_scale=2.0)


def lumina2(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Lumina-Image 2.0: text and image in one stream, refiners before it, prompts of different lengths."""
    transformer = component(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    scheduler = flow_matching(use_dynamic_shifting=True)
    pipeline = assembled("Lumina2Pipeline", scheduler=scheduler, vae=kl_autoencoder(), transformer=transformer)
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    return pipeline, _call(
        size,
        steps,
        prompt_embeds=randn(batch, 6, 16, seed=21),
        prompt_attention_mask=mask,
        negative_prompt_embeds=randn(batch, 6, 16, seed=23),
        negative_prompt_attention_mask=torch.ones(batch, 6, dtype=torch.bool),
        guidance_scale=2.0,
    )


def z_image(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Z-Image: lists of images and captions, refiners before the main blocks."""
    transformer = component(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    scheduler = flow_matching(use_dynamic_shifting=False)
    pipeline = assembled("ZImagePipeline", scheduler=scheduler, vae=kl_autoencoder(), transformer=transformer)
    return pipeline, _call(
        size,
        steps,
        prompt_embeds=[randn(6 - image, 16, seed=21 + 100 * image) for image in range(batch)],
        negative_prompt_embeds=[randn(4, 16, seed=23 + 100 * image) for image in range(batch)],
        guidance_scale=2.0,
    )


def hidream(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """HiDream-I1: blocks inside wrappers, a mixture of experts, both branches in one batch."""
    transformer = component(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        caption_channels=[32, 16],
        text_emb_dim=16,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 0, 1],
        force_inference_output=True,
        **_HEADS,
    )
    pipeline = assembled(
        "HiDreamImagePipeline",
        _numbered("text_encoder", "tokenizer", last=4),
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=kl_autoencoder(),
        transformer=transformer,
    )
    # The pipeline makes every picture's area that of a square of this side.
    pipeline.default_sample_size = math.ceil(math.prod(_sides(size)) ** 0.5 / 8)
    embeds = {
        f"{prefix}{name}": randn(*shape, seed=seed + index)
        for prefix, seed in (("", 21), ("negative_", 31))
        for index, (name, shape) in enumerate(
            {
                "prompt_embeds_t5": (batch, 4, 32),
                "prompt_embeds_llama3": (2, batch, 4, 16),
                "pooled_prompt_embeds": (batch, 16),
            }.items()
        )
    }
    return pipeline, _call(size, steps, **embeds, guidance_scale=2.0)


def pixart(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """PixArt-Sigma: cross attention, a position buffer, a multistep DPM solver, both branches in one batch."""
    transformer = component(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=3,
        patch_size=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
        **_HEADS,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipeline = assembled("PixArtSigmaPipeline", scheduler=scheduler, vae=kl_autoencoder(), transformer=transformer)
    return pipeline, _call(
        size,
        steps,
        negative_prompt=None,
        prompt_embeds=randn(batch, 6, 32, seed=21),
        prompt_attention_mask=torch.ones(batch, 6),
        negative_prompt_embeds=randn(batch, 6, 32, seed=23),
        negative_prompt_attention_mask=torch.ones(batch, 6),
        guidance_scale=3.0,
        use_resolution_binning=False,
    )


def wan(*, size: Size = 32, steps: int = 4, batch: int = 1) -> Built:
    """Wan text to video, five frames, with a multistep scheduler and two calls a step."""
    transformer = component(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = component(
        "AutoencoderKLWan",
        seed=1,
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipeline = assembled("WanPipeline", scheduler=scheduler, vae=vae, transformer=transformer)
    embeds = {"prompt_embeds": randn(batch, 6, 16, seed=21), "negative_prompt_embeds": randn(batch, 6, 16, seed=23)}
    return pipeline, _call(size, steps, **embeds, num_frames=5, guidance_scale=3.0)


def _guided(batch: int, width: int) -> Call:
    return {
        "prompt_embeds": randn(batch, 6, width, seed=21),
        "prompt_attention_mask": torch.ones(batch, 6),
        "negative_prompt_embeds": randn(batch, 6, width, seed=23),
        "negative_prompt_attention_mask": torch.ones(batch, 6),
        "guidance_scale": 3.0,
    }


def aura_flow(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """AuraFlow: a learned table of positions, both branches in one batch."""
    transformer = component("AuraFlowTransformer2DModel", **AURA_FLOW)
    parts = {"scheduler": flow_matching(), "vae": kl_autoencoder()}
    return assembled("AuraFlowPipeline", transformer=transformer, **parts), _call(size, steps, **_guided(batch, 32))


def sana(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """Sana: linear attention, convolutions over the frame, an autoencoder without a distribution, a DPM solver."""
    transformer = component("SanaTransformer2DModel", **SANA)
    vae = component(
        "AutoencoderDC",
        seed=1,
        latent_channels=4,
        attention_head_dim=4,
        **{f"{part}_block_types": "ResBlock" for part in ("encoder", "decoder")},
        **{f"{part}_block_out_channels": (4, 8, 8, 8, 8) for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": (1,) * 5 for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": ((),) * 5 for part in ("encoder", "decoder")},
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = assembled("SanaPipeline", scheduler=scheduler, vae=vae, transformer=transformer)
    return pipeline, _call(size, steps, **_guided(batch, 16), negative_prompt=None, use_resolution_binning=False)


def prx(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """PRX: the ids of a whole frame are made in the forward. Guided, the pipeline takes a single prompt."""
    transformer = component("PRXTransformer2DModel", **PRX)
    parts = {"scheduler": flow_matching(), "vae": kl_autoencoder()}
    call = _guided(batch, 32) | {"guidance_scale": 1.0}
    call |= {name: value.bool() for name, value in call.items() if "mask" in name}
    pipeline = assembled("PRXPipeline", transformer=transformer, **parts)
    return pipeline, _call(size, steps, **call, use_resolution_binning=False)


def hunyuan_video(*, size: Size = 64, steps: int = 4, batch: int = 1) -> Built:
    """HunyuanVideo, five frames, with true guidance: two calls a step."""
    transformer = component("HunyuanVideoTransformer3DModel", **HUNYUAN_VIDEO)
    vae = component(
        "AutoencoderKLHunyuanVideo",
        seed=1,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = assembled(
        "HunyuanVideoPipeline",
        _numbered("text_encoder", "tokenizer"),
        scheduler=flow_matching(),
        vae=vae,
        transformer=transformer,
    )
    embeds = {
        f"{prefix}{name}": value
        for prefix, seed in (("", 21), ("negative_", 23))
        for name, value in {
            "prompt_embeds": randn(batch, 6, 32, seed=seed),
            "pooled_prompt_embeds": randn(batch, 8, seed=seed + 1),
            "prompt_attention_mask": torch.ones(batch, 6),
        }.items()
    }
    return pipeline, _call(size, steps, **embeds, num_frames=5, true_cfg_scale=2.0)


#: Every builder by the name of its pipeline's class.
PIPELINES: dict[str, Builder] = {
    "FluxPipeline": flux,
    "FluxKontextPipeline": flux_kontext,
    "ChromaPipeline": chroma,
    "OvisImagePipeline": ovis_image,
    "BriaPipeline": bria,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2_klein,
    "QwenImagePipeline": qwen_image,
    "StableDiffusion3Pipeline": sd3,
    "HunyuanImagePipeline": hunyuan_image,
    "CogView4Pipeline": cogview4,
    "Lumina2Pipeline": lumina2,
    "ZImagePipeline": z_image,
    "HiDreamImagePipeline": hidream,
    "PixArtSigmaPipeline": pixart,
    "WanPipeline": wan,
    "HunyuanVideoPipeline": hunyuan_video,
    "AuraFlowPipeline": aura_flow,
    "SanaPipeline": sana,
    "PRXPipeline": prx,
    "FluxImg2ImgPipeline": from_picture("FluxImg2ImgPipeline", flux),
    "ChromaImg2ImgPipeline": from_picture("ChromaImg2ImgPipeline", chroma),
    "QwenImageImg2ImgPipeline": from_picture("QwenImageImg2ImgPipeline", qwen_image),
    "StableDiffusion3Img2ImgPipeline": from_picture("StableDiffusion3Img2ImgPipeline", sd3),
    "FluxFillPipeline": flux_fill,
    "FluxKontextInpaintPipeline": from_picture("FluxKontextInpaintPipeline", flux_kontext),
    "FluxInpaintPipeline": from_picture("FluxInpaintPipeline", flux),
    "ZImageInpaintPipeline": from_picture("ZImageInpaintPipeline", z_image),
    "QwenImageInpaintPipeline": from_picture("QwenImageInpaintPipeline", qwen_image),
    "StableDiffusion3InpaintPipeline": from_picture("StableDiffusion3InpaintPipeline", partial(sd3, channels=16)),
    "ZImageImg2ImgPipeline": from_picture("ZImageImg2ImgPipeline", z_image),
}

#: Pixels on a side of a token, where they are not 16.
TOKEN_PIXELS: dict[str, int] = {
    "Flux2Pipeline": 4,
    "Flux2KleinPipeline": 4,
    "QwenImagePipeline": 8,
    "QwenImageImg2ImgPipeline": 8,
    "QwenImageInpaintPipeline": 8,
    "HunyuanImagePipeline": 8,
}
