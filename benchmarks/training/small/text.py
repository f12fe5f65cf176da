"""The text encoders: a small CLIP (pooled) and a small T5 (tokens) that learn to say what a prompt asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastdit.mini.prompts import (
    BACKGROUNDS,
    OBJECTS,
    PLACES,
    RELATIONS,
    SIZES,
    Scene,
    vocabulary,
)
from training.small.render import random_scene
from training.small.stage import Stage

LENGTH = 16
WIDTH = 128
_BATCH = 192
_RATE = 2e-3
_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
_CHOICES: tuple[tuple[str, ...], ...] = (OBJECTS, OBJECTS, BACKGROUNDS, SIZES, PLACES, RELATIONS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that ends every prompt with <eos>."""
    words = {word: index for index, word in enumerate([*_SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", words["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=LENGTH,
    )


def build_encoders(tokenizer: PreTrainedTokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Make untrained encoders for a tokenizer."""
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    clip = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        **tokens,
    )
    t5 = T5Config(
        d_model=WIDTH,
        d_ff=2 * WIDTH,
        d_kv=WIDTH // 4,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=tokenizer.pad_token_id,
        **tokens,
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    """Give padded token ids [B, LENGTH], as FluxPipeline does."""
    ids: torch.Tensor = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def encode(clip: CLIPTextModel, t5: T5EncoderModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the pooled embedding [B, WIDTH] and the token embeddings [B, LENGTH, WIDTH]; no padding mask, as in FLUX."""
    return clip(ids).pooler_output, t5(ids).last_hidden_state


def encoder(directory: Path) -> Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]:
    """Give trained encoders as a function of prompts: the pooled [B, WIDTH] and the token embeddings."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    clip = CLIPTextModel.from_pretrained(directory / "text_encoder").eval()
    t5 = T5EncoderModel.from_pretrained(directory / "text_encoder_2").eval()
    return lambda prompts: encode(clip, t5, tokenize(tokenizer, prompts))


def train(directory: Path, minutes: float) -> None:
    """Train both encoders to predict a prompt's parts, and save them with their tokenizer."""
    torch.manual_seed(1)
    stage = Stage("text", directory, minutes)
    random = np.random.default_rng(1)
    tokenizer = build_tokenizer()
    clip, t5 = build_encoders(tokenizer)
    heads = nn.ModuleList(nn.Linear(WIDTH, sum(len(choice) + 1 for choice in _CHOICES)) for _ in range(2))
    parameters = [*clip.parameters(), *t5.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01)
    while stage.progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * stage.lr_factor(decay_share=1.0)
        scenes = [random_scene(random) for _ in range(_BATCH)]
        pooled, tokens = encode(clip, t5, tokenize(tokenizer, [scene.prompt() for scene in scenes]))
        labels = torch.tensor([_labels(scene) for scene in scenes])
        logits = (heads[0](pooled), heads[1](tokens.mean(dim=1)))
        loss = torch.stack([_part_loss(part, labels) for part in logits]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        stage.step += 1
        if stage.step % 100 == 0:
            stage.log(loss=loss.item())
    clip.save_pretrained(directory / "text_encoder")
    _name_as_published(directory / "text_encoder" / "model.safetensors")
    t5.save_pretrained(directory / "text_encoder_2")
    tokenizer.save_pretrained(directory / "tokenizer")
    tokenizer.save_pretrained(directory / "tokenizer_2")


def _name_as_published(path: Path) -> None:
    """Give a CLIP encoder's weights the names of published ones: transformers 5 saves others, which 4 can't read."""
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _labels(scene: Scene) -> list[int]:
    objects: tuple[str | None, ...] = (*scene.objects, None)[:2]
    values = (*objects, scene.background, scene.size, scene.place, scene.relation)
    return [0 if v is None else 1 + choice.index(v) for v, choice in zip(values, _CHOICES, strict=True)]


def _part_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parts = logits.split_with_sizes([len(choice) + 1 for choice in _CHOICES], dim=1)
    return torch.stack([functional.cross_entropy(p, labels[:, i]) for i, p in enumerate(parts)]).mean()
