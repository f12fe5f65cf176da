"""FLOPs of whole runs, counted on the meta device from a model's configuration and a plan of steps and tokens.

Two accountings stand side by side. `transformer` counts everything the transformer multiplies, attention included.
`published` follows the tables of the RALU paper (arXiv 2507.08422): linear layers and convolutions only, attention
left out, but with the text encoders and the decoder, and for RALU the extra decode of its edge selection. Guidance
counts: a guided step is a forward of two rows, and both prompts are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from architectures import ARCHITECTURES, CLIP_TOKENS, Architecture
from fastdit.step import SchedulePlan

_LINEAR_OPERATORS = frozenset({"aten.mm", "aten.addmm", "aten.convolution"})


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (a multiply-add is two), split into linear layers and attention products."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.linear * times, self.attention * times)


@dataclass(frozen=True)
class Stage:
    """So many steps at so many image tokens."""

    steps: int
    tokens: int


def stages_of(plan: SchedulePlan) -> list[Stage]:
    """The steps and tokens of a schedule's plan."""
    return [Stage(stage.steps, stage.tokens) for stage in plan.stages if stage.tokens is not None]


def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Flops:
    """FLOPs of one call of a module that lives on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    operators = {str(operator): flops for operator, flops in counter.get_flop_counts().get("Global", {}).items()}
    linear = sum(flops for operator, flops in operators.items() if operator in _LINEAR_OPERATORS)
    return Flops(linear, sum(operators.values()) - linear)


class RunFlops:
    """FLOPs of whole runs of one architecture at one size; every count is made once.

    `text_tokens` are those of the T5 encoder; without a number they are the architecture's own.
    """

    def __init__(
        self, architecture: Architecture | str, *, height: int = 1024, width: int = 1024, text_tokens: int | None = None
    ) -> None:
        self.architecture = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
        self.height, self.width = height, width
        self.text_tokens = self.architecture.text_tokens if text_tokens is None else text_tokens
        self._steps: dict[int, Flops] = {}

    @property
    def image_tokens(self) -> int:
        """Tokens of the full-size picture."""
        return self.architecture.image_tokens(self.height, self.width)

    def step(self, tokens: int) -> Flops:
        """One forward of the transformer with this many image tokens, with both rows where it is guided."""
        if tokens not in self._steps:
            with torch.device("meta"):
                config = self._transformer.config
                inputs = self.architecture.inputs(config, tokens, self.text_tokens)
                self._steps[tokens] = count(self._transformer, **inputs)
        return self._steps[tokens]

    def transformer(self, stages: Iterable[Stage]) -> Flops:
        """The transformer over a whole run; text encoder and decoder left out."""
        return sum((self.step(stage.tokens) * stage.steps for stage in stages), Flops(0, 0))

    def published(self, stages: Iterable[Stage]) -> int:
        """The RALU paper's number for this run: linear layers, text encoders and decoder included.

        A run that changes its tokens on the way also decodes once at half the size, to find the edges.
        """
        stages = tuple(stages)
        linear = self.transformer(stages).linear + self._text_encoders.linear
        linear += self._decoder(self.height, self.width).linear
        if len(stages) > 1:
            linear += self._decoder(self.height // 2, self.width // 2).linear
        return linear

    @cached_property
    def _transformer(self) -> Any:
        return self.architecture.build_transformer()

    @cached_property
    def _text_encoders(self) -> Flops:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        prompts = 2 if self.architecture.guided else 1
        with torch.device("meta"):
            t5 = T5EncoderModel(T5Config(**self.architecture.text_encoder_config)).eval()
            total = count(t5, input_ids=torch.zeros(prompts, self.text_tokens, dtype=torch.long))
            for config in self.architecture.clip_configs:
                clip = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
                total += count(clip, input_ids=torch.zeros(prompts, CLIP_TOKENS, dtype=torch.long))
        return total

    def _decoder(self, height: int, width: int) -> Flops:
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            autoencoder = AutoencoderKL(**self.architecture.decoder_config).eval()
            factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
            latents = torch.empty(1, autoencoder.config.latent_channels, height // factor, width // factor)
            return count(autoencoder.decoder, latents)
