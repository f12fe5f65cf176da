"""Tiny pipelines out of the real diffusers and transformers classes, with seeded random weights.

Nothing is downloaded and nothing is mocked: each builder returns a pipeline that a user could have loaded, only
thousands of times smaller, and the keyword arguments of one call. The text encoders are left out where the pipeline
takes embeddings; `flux(text=True)` has real CLIP and T5 encoders with tokenizers that are built here.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fastdit import UnsupportedModel, testing
from fastdit.testing import counted_calls, seed_weights
from fastdit.testing import flux_transformer as flux_transformer
from fastdit.testing.tiny import Built, assembled, component
from fastdit.testing.tiny import randn as randn

Kwargs = dict[str, Any]

flux2 = testing.PIPELINES["Flux2Pipeline"]
pixart = testing.PIPELINES["PixArtSigmaPipeline"]
qwen_image = testing.PIPELINES["QwenImagePipeline"]
wan = testing.PIPELINES["WanPipeline"]
z_image = testing.PIPELINES["ZImagePipeline"]


def _clip_tokenizer(vocab: dict[str, int]) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    except TypeError:  # transformers before 5 reads files
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
            (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
            return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


def _t5_tokenizer(pieces: list[tuple[str, float]]) -> Any:
    from transformers import T5TokenizerFast

    try:
        return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)
    except (TypeError, ValueError):  # transformers before 5 takes a ready tokenizer
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=64)


_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-"


def _clip_parts(kind: str, width: int, layers: int = 1) -> tuple[nn.Module, Any]:
    """A CLIP text encoder of a transformers class, with a tokenizer made of single characters."""
    import transformers

    vocab = {token: i for i, token in enumerate([*_LETTERS, *(letter + "</w>" for letter in _LETTERS)])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    end = vocab["<|endoftext|>"]
    clip = getattr(transformers, kind)(
        transformers.CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=width,
            intermediate_size=37,
            num_attention_heads=2,
            num_hidden_layers=layers,
            projection_dim=width,
            max_position_embeddings=77,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).eval()
    seed_weights(clip, 11)
    return clip, _clip_tokenizer(vocab)


def _text_parts() -> Kwargs:
    """CLIP and T5 encoders with tokenizers made of single characters."""
    from transformers import T5Config, T5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    clip, tokenizer = _clip_parts("CLIPTextModel", 32)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0)
    ).eval()
    seed_weights(t5, 12)
    return {
        "text_encoder": clip,
        "tokenizer": tokenizer,
        "text_encoder_2": t5,
        "tokenizer_2": _t5_tokenizer(pieces),
    }


def _prompts(batch: int) -> Kwargs:
    return {"prompt": "a red fox" if batch == 1 else ["a red fox", "two cats", "the sea"][:batch]}


def flux(
    *,
    guidance: bool = True,
    text: bool = False,
    vae: str = "kl",
    batch: int = 1,
    seed: int = 0,
    gain: float = 1.0,
    **options: Any,
) -> Built:
    """FLUX; `size` is the side in pixels or (height, width), 16 pixels a token."""
    pipe, call = testing.PIPELINES["FluxPipeline"](batch=batch, transformer={"guidance_embeds": guidance}, **options)
    if (seed, gain) != (0, 1.0):
        seed_weights(pipe.transformer, seed, gain)
    parts = dict(pipe.components)
    if vae == "tiny":
        parts |= {"vae": component("AutoencoderTiny")}
    if text:
        parts |= _text_parts()
        call = {name: value for name, value in call.items() if "embeds" not in name}
        call |= _prompts(batch) | {"max_sequence_length": 16}
    return assembled("FluxPipeline", parts), call


def flux_negative(call: Kwargs, scale: float = 2.0) -> Kwargs:
    """What turns a FLUX call into one with true classifier-free guidance: two branches a step."""
    negative = {
        "negative_prompt_embeds": torch.randn(call["prompt_embeds"].shape, generator=torch.Generator().manual_seed(23)),
        "negative_pooled_prompt_embeds": torch.randn(
            call["pooled_prompt_embeds"].shape, generator=torch.Generator().manual_seed(24)
        ),
    }
    return {**call, **negative, "true_cfg_scale": scale}


def sd3(*, text: bool = False, three_five: bool = False, positions: int = 16, batch: int = 1, **options: Any) -> Built:
    """Stable Diffusion 3; `text` brings two CLIP encoders (T5 is left out, which the pipeline fills with zeros).

    `three_five` adds what 3.5 has: a second attention in some blocks, normed queries and keys.
    """
    changes: Kwargs = {"pos_embed_max_size": positions}
    if three_five:
        changes |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    pipe, call = testing.PIPELINES["StableDiffusion3Pipeline"](batch=batch, transformer=changes, **options)
    if not text:
        return pipe, call
    for suffix in ("", "_2"):
        clip, tokenizer = _clip_parts("CLIPTextModelWithProjection", 16, layers=2)
        pipe.register_modules(**{f"text_encoder{suffix}": clip, f"tokenizer{suffix}": tokenizer})
    call = {name: value for name, value in call.items() if "embeds" not in name and name != "guidance_scale"}
    return pipe, call | _prompts(batch)


def wan_two(*, steps: int = 4, boundary: float = 0.8) -> Built:
    """Wan 2.2: one transformer for the noisy timesteps, from `boundary` (a share of all) on another."""
    first, call = wan(steps=steps)
    second, _ = wan()
    seed_weights(second.transformer, 5)
    parts = first.components | {"transformer_2": second.transformer, "boundary_ratio": boundary}
    return assembled("WanPipeline", parts), call


PIPELINES: dict[str, Callable[..., Built]] = {
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "qwen-image": qwen_image,
    "wan": wan,
    "z-image": z_image,
    "pixart": pixart,
}

BLOCKS: dict[str, tuple[str, ...]] = {
    "flux": ("transformer_blocks", "single_transformer_blocks"),
    "flux2": ("transformer_blocks", "single_transformer_blocks"),
    "sd3": ("transformer_blocks",),
    "qwen-image": ("transformer_blocks",),
    "wan": ("blocks",),
    "z-image": ("layers",),
    "pixart": ("transformer_blocks",),
}
"""The block lists that make up each model's main stack, in the order they run."""


def described(name: str, rows: int = 8, columns: int = 12, **options: Any) -> Built:
    """A tiny pipeline by its class's name, for two prompts and a picture of so many tokens, or a skipped test."""
    row = testing.PIPELINES[name]
    options = {"steps": 6, "batch": 2, **options}
    return _or_skipped(lambda: row(size=(row.token * rows, row.token * columns), **options))


def _or_skipped(build: Callable[[], Any]) -> Any:
    """What is built, or a skipped test where the installed diffusers lacks the class."""
    try:
        return build()
    except UnsupportedModel as error:
        pytest.skip(str(error))


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Kwargs]]] = {
    name: functools.partial(_or_skipped, build) for name, build in testing.TRANSFORMERS.items()
}
"""Transformers by themselves, each with the arguments of one forward."""


def run(pipe: DiffusionPipeline, call: Kwargs, *, seed: int | None = 0, **changes: Any) -> Any:
    """Call the pipeline with a fresh generator; the first output: a tensor unless `output_type` says otherwise."""
    arguments = {**call, **changes}
    if seed is not None and "generator" not in arguments:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return pipe(**arguments, return_dict=False)[0]


def main_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of the main stack in running order."""
    names = next(
        names
        for names in (
            ("transformer_blocks", "single_transformer_blocks"),
            ("transformer_blocks",),
            ("blocks",),
            ("layers",),
        )
        if all(hasattr(transformer, name) for name in names)
    )
    return [block for name in names for block in getattr(transformer, name)]


def counted_blocks(transformer: nn.Module) -> AbstractContextManager[list[int]]:
    """Count real calls of each main block while the context is open."""
    return counted_calls(transformer, main_blocks(transformer))


def recorded_calls(pipe: DiffusionPipeline, call: Kwargs) -> list[tuple[tuple[Any, ...], Kwargs]]:
    """The arguments of every transformer call that one plain run makes, to be replayed in a loop of one's own."""
    calls: list[tuple[tuple[Any, ...], Kwargs]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        calls.append((args, kwargs))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run(pipe, call)
    finally:
        handle.remove()
    return calls


def lora(transformer: nn.Module, *, seed: int = 0, rank: int = 2, strength: float = 0.2) -> dict[str, Tensor]:
    """A LoRA state dict over a FLUX transformer's queries and single-block feed-forwards."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("attn.to_q", "proj_mlp")):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = strength * up
    return state
