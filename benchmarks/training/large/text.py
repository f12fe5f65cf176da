"""The text encoders: a small CLIP (pooled) and a small T5 (tokens) that learn to say what a prompt asks for.

The pooled vector must tell everything; of T5's tokens a learned query for each attribute must be able to read it, so
that what a word means stays at a token, as the transformer wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastdit.mini.large.scenes import (
    COUNTS,
    GROUNDS,
    LIGHTS,
    NOUNS,
    PLACES,
    RELATIONS,
    SIZES,
    Scene,
    random_scene,
    vocabulary,
)
from training.large.run import Run

#: The longest prompt has eleven words; an end follows it.
LENGTH = 12
WIDTH = 128
_BATCH = 128
_RATE = 2e-3
_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
_CHOICES: tuple[tuple[object, ...], ...] = (
    NOUNS,
    NOUNS,
    tuple(COUNTS),
    RELATIONS,
    SIZES,
    tuple(PLACES),
    tuple(GROUNDS),
    tuple(LIGHTS),
)

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that ends every prompt with <eos>."""
    words = {word: index for index, word in enumerate([*_SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
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


def build(tokenizer: PreTrainedTokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
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


class Reader(nn.Module):
    """What training reads the embeddings with; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(_CHOICES), WIDTH) * WIDTH**-0.5)
        self.of_pooled = nn.ModuleList(nn.Linear(WIDTH, len(choice) + 1) for choice in _CHOICES)
        self.of_tokens = nn.ModuleList(nn.Linear(WIDTH, len(choice) + 1) for choice in _CHOICES)

    def forward(self, pooled: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give the logits of every attribute by the pooled [B, W] and by the token embeddings [B, L, W]."""
        weights = (tokens @ self.queries.mT).softmax(dim=1)
        read = weights.mT @ tokens
        return [
            (of_pooled(pooled), of_tokens(read[:, index]))
            for index, (of_pooled, of_tokens) in enumerate(zip(self.of_pooled, self.of_tokens, strict=True))
        ]


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """Give padded token ids [B, LENGTH], as FluxPipeline does."""
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def encode(clip: CLIPTextModel, t5: T5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Give the pooled embedding [B, WIDTH] and the token embeddings [B, LENGTH, WIDTH]; no padding mask, as in FLUX."""
    return clip(ids).pooler_output, t5(ids).last_hidden_state


def encoder(directory: Path, device: torch.device) -> Encode:
    """Give trained encoders as a function of prompts, which knows the prompts that it has seen."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    clip = CLIPTextModel.from_pretrained(directory / "text_encoder").float().eval().to(device)
    t5 = T5EncoderModel.from_pretrained(directory / "text_encoder_2").float().eval().to(device)

    @torch.no_grad()
    def embed(prompts: list[str]) -> tuple[Tensor, Tensor]:
        return encode(clip, t5, tokenize(tokenizer, prompts).to(device))

    return embed


def train(
    directory: Path, device: torch.device, minutes: float, *, cooldown: float = 0.0, ends: float | None = None
) -> None:
    """Train both encoders to tell a prompt's attributes, and save them with their tokenizer."""
    torch.manual_seed(1)
    run = Run("text", directory, minutes, device, cooldown=cooldown, ends=ends)
    tokenizer = build_tokenizer()
    clip, t5 = build(tokenizer)
    modules = nn.ModuleList([clip, t5, Reader()]).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=_RATE, weight_decay=0.01)
    if (state := run.resume(device)) is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
    while not run.over:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * run.rate_factor(warmup_steps=100)
        loss, right = _loss(modules, tokenizer, run, device, held_out=False)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.step += 1
        run.samples += _BATCH
        if run.step % 100 == 0:
            run.log(loss=loss.item(), right=right.item())
        if run.wants_saving:
            run.save(modules=modules.state_dict(), optimizer=optimizer.state_dict())
    run.save(modules=modules.state_dict(), optimizer=optimizer.state_dict())
    with torch.no_grad():
        loss, right = _loss(modules, tokenizer, run, device, held_out=True)
    run.log(held_out_loss=loss.item(), held_out_right=right.item())
    clip.save_pretrained(directory / "text_encoder")
    _name_as_published(directory / "text_encoder" / "model.safetensors")
    t5.save_pretrained(directory / "text_encoder_2")
    tokenizer.save_pretrained(directory / "tokenizer")


def _loss(
    modules: nn.ModuleList, tokenizer: PreTrainedTokenizerFast, run: Run, device: torch.device, *, held_out: bool
) -> tuple[Tensor, Tensor]:
    """Give the loss of this step's prompts, and the share of attributes that are told rightly both ways."""
    random = run.random(stream=1)
    scenes = [random_scene(random, held_out=held_out) for _ in range(_BATCH)]
    clip, t5, reader = modules
    read = reader(*encode(clip, t5, tokenize(tokenizer, [scene.prompt() for scene in scenes]).to(device)))
    truth = torch.tensor([_labels(scene) for scene in scenes], device=device)
    losses, right = [], []
    for index, pair in enumerate(read):
        losses += [functional.cross_entropy(logits, truth[:, index]) for logits in pair]
        right += [(logits.argmax(dim=1) == truth[:, index]).float().mean() for logits in pair]
    return torch.stack(losses).mean(), torch.stack(right).mean()


def _labels(scene: Scene) -> list[int]:
    nouns: tuple[str | None, ...] = (*scene.nouns, None)[:2]
    values = (*nouns, scene.count, scene.relation, scene.size, scene.place, scene.ground, scene.light)
    return [1 + choice.index(v) if v in choice else 0 for v, choice in zip(values, _CHOICES, strict=True)]


def _name_as_published(path: Path) -> None:
    """Give a CLIP encoder's weights the names of published ones: transformers 5 saves others, which 4 can't read."""
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
