"""Tiny transformers out of the real diffusers classes, with seeded weights and the arguments of one forward.

They cover families that `tiny_pipelines` has no whole pipeline of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdit.testing.tiny_pipelines import (
    AURA_FLOW,
    HUNYUAN_VIDEO,
    PRX,
    SANA,
    Call,
    component,
    randn,
)

Built = tuple[nn.Module, Call]
HEADS: Call = {"num_attention_heads": 2, "attention_head_dim": 16}


def _packed(name: str, width: int = 16, **config: Any) -> Built:
    """FLUX's relatives: packed tokens with position ids, double blocks then single ones."""
    layers: Call = {"num_layers": 2, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    model = component(name, patch_size=1, in_channels=width, **HEADS, **layers, **config)
    rows = torch.arange(16) // 4
    image_ids = torch.stack([torch.zeros(16), rows.float(), (torch.arange(16) % 4).float()], dim=1)
    return model, {
        "hidden_states": randn(1, 16, width, seed=31),
        "encoder_hidden_states": randn(1, 6, 32, seed=32),
        "timestep": torch.tensor([0.7]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(6, 3),
    }


def chroma() -> Built:
    """Chroma: one embedding for all blocks, cut into rows."""
    config = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model, call = _packed("ChromaTransformer2DModel", **config)
    return model, call | {"attention_mask": torch.ones(1, 22, dtype=torch.bool)}


def bria() -> Built:
    """Bria 3."""
    return _packed("BriaTransformer2DModel")


def bria_fibo() -> Built:
    """Bria Fibo: text features for each block."""
    model, call = _packed("BriaFiboTransformer2DModel", text_encoder_dim=16)
    return model, call | {"text_encoder_layers": [randn(1, 6, 16, seed=33) for _ in range(3)]}


def longcat_image() -> Built:
    """LongCat-Image."""
    return _packed("LongCatImageTransformer2DModel", pooled_projection_dim=32)


def ovis_image() -> Built:
    """Ovis-Image."""
    return _packed("OvisImageTransformer2DModel", out_channels=16)


def aura_flow() -> Built:
    """AuraFlow."""
    model = component("AuraFlowTransformer2DModel", **AURA_FLOW)
    return model, _image(4)


def _image(channels: int, text: int = 32) -> Call:
    return {
        "hidden_states": randn(1, channels, 8, 8, seed=31),
        "encoder_hidden_states": randn(1, 6, text, seed=32),
        "timestep": torch.tensor([7.0]),
    }


def _video(channels: int, text: int = 32) -> Call:
    return _image(channels, text) | {"hidden_states": randn(1, channels, 2, 8, 8, seed=31)}


def _cogview(name: str, **config: Any) -> Built:
    common = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32}
    model = component(name, **HEADS, **common, time_embed_dim=8, condition_dim=4, **config)
    size = torch.tensor([[8.0, 8.0]])
    return model, _image(4) | {"target_size": size, "crop_coords": torch.zeros(1, 2)}


def cogview4() -> Built:
    """CogView4."""
    model, call = _cogview("CogView4Transformer2DModel", sample_size=8, pos_embed_max_size=8, rope_axes_dim=(8, 8))
    return model, call | {"original_size": call["target_size"]}


def cogview3_plus() -> Built:
    """CogView3Plus."""
    model, call = _cogview("CogView3PlusTransformer2DModel", sample_size=8, pos_embed_max_size=8)
    return model, call | {"original_size": call["target_size"]}


def glm_image() -> Built:
    """GLM-Image: tokens of a prior are added to the image's."""
    model, call = _cogview("GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=16)
    prior = {"prior_token_id": torch.arange(16)[None], "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool)}
    return model, call | prior


def _cogvideox(name: str, **config: Any) -> Built:
    model = component(
        name,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
        **HEADS,
        **config,
    )
    return model, _image(4) | {"hidden_states": randn(1, 2, 4, 8, 8, seed=31), "timestep": torch.tensor([500])}


def cogvideox() -> Built:
    """CogVideoX."""
    return _cogvideox("CogVideoXTransformer3DModel")


def consisid() -> Built:
    """ConsisID without a face."""
    return _cogvideox("ConsisIDTransformer3DModel", is_train_face=False)


def mochi() -> Built:
    """Mochi."""
    model = component(
        "MochiTransformer3DModel",
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=6,
        **HEADS,
    )
    return model, _video(4) | {"encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)}


def hunyuan_video(condition: str | None = None) -> Built:
    """HunyuanVideo, or with `token_replace` its image to video."""
    model = component("HunyuanVideoTransformer3DModel", **HUNYUAN_VIDEO, image_condition_type=condition)
    return model, _video(4) | {
        "encoder_attention_mask": torch.ones(1, 6),
        "pooled_projections": randn(1, 8, seed=33),
        "guidance": torch.tensor([6000.0]),
    }


def hunyuan_video_token_replace() -> Built:
    """HunyuanVideo image to video, whose first frame has an embedding of its own."""
    return hunyuan_video("token_replace")


def hunyuan_image() -> Built:
    """HunyuanImage 2.1."""
    model = component(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        rope_axes_dim=(8, 8),
        **HEADS,
    )
    return model, _image(4) | {"encoder_attention_mask": torch.ones(1, 6)}


def hunyuan_video15() -> Built:
    """HunyuanVideo 1.5, with two texts and no image."""
    model = component(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
        **HEADS,
    )
    return model, _video(4) | {
        "encoder_attention_mask": torch.ones(1, 6),
        "encoder_hidden_states_2": randn(1, 4, 16, seed=33),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 16),
    }


def ltx_video() -> Built:
    """LTX-Video: packed video tokens."""
    model = component(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
        **HEADS,
    )
    return model, {
        "hidden_states": randn(1, 32, 4, seed=31),
        "encoder_hidden_states": randn(1, 6, 16, seed=32),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def lumina2() -> Built:
    """Lumina-Image 2.0: text and image in one stream, refiners before it."""
    model = component(
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
    return model, _image(4, 16) | {"encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)}


def lumina_next() -> Built:
    """Lumina-Next."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = component(
        "LuminaNextDiT2DModel",
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    return model, _image(4) | {
        "encoder_mask": torch.ones(1, 6),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 32, 32),
        "cross_attention_kwargs": {},
    }


def hidream() -> Built:
    """HiDream-I1: blocks inside wrappers, a mixture of experts."""
    model = component(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[32, 16],
        text_emb_dim=16,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=True,
        **HEADS,
    )
    return model, {
        "hidden_states": randn(1, 4, 8, 8, seed=31),
        "timesteps": torch.tensor([7.0]),
        "encoder_hidden_states_t5": randn(1, 4, 32, seed=32),
        "encoder_hidden_states_llama3": randn(2, 1, 4, 16, seed=33),
        "pooled_embeds": randn(1, 16, seed=34),
    }


def sana() -> Built:
    """Sana: linear attention."""
    model = component("SanaTransformer2DModel", **SANA)
    return model, _image(4, 16)


def cosmos() -> Built:
    """Cosmos 1.0 with learned positions."""
    model = component(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,
        **HEADS,
    )
    return model, _video(4) | {"fps": 30}


def prx() -> Built:
    """PRX."""
    model = component("PRXTransformer2DModel", **PRX)
    return model, _image(4) | {"attention_mask": torch.ones(1, 6, dtype=torch.bool)}


def easy_animate() -> Built:
    """EasyAnimate."""
    model = component(
        "EasyAnimateTransformer3DModel",
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=32,
        **HEADS,
    )
    return model, _video(4)


def stable_audio() -> Built:
    """Stable Audio: the time embedding is the first token."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = component(
        "StableAudioDiTModel",
        sample_size=8,
        in_channels=4,
        num_layers=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=16,
        **HEADS,
    )
    rotary = get_1d_rotary_pos_embed(8, 9, use_real=True, repeat_interleave_real=False)
    return model, {
        "hidden_states": randn(1, 4, 8, seed=31),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, 6, 16, seed=32),
        "global_hidden_states": randn(1, 1, 16, seed=33),
        "rotary_embedding": rotary,
    }


TRANSFORMERS: dict[str, Callable[[], Built]] = {
    builder.__name__.replace("_", "-"): builder
    for builder in (
        aura_flow,
        bria,
        bria_fibo,
        chroma,
        cogvideox,
        cogview3_plus,
        cogview4,
        consisid,
        cosmos,
        easy_animate,
        glm_image,
        hidream,
        hunyuan_image,
        hunyuan_video,
        hunyuan_video15,
        hunyuan_video_token_replace,
        longcat_image,
        ltx_video,
        lumina2,
        lumina_next,
        mochi,
        ovis_image,
        prx,
        sana,
        stable_audio,
    )
}
