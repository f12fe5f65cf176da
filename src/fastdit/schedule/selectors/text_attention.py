"""TextAttention: the coarse tokens that exchange the most attention with the prompt's are split first (AViTS, 2026).

In a block that attends to text and image together, a the mean attention map of its heads (rows are queries),

    given_i    = sum over text tokens j of a_ij
    received_i = mean over text tokens j of a_ji

for an image token i, mean over the blocks. It is read at the last coarse step alone, for one more product of queries
and keys a block; caches run that step whole. AViTS also weighs temporal variance, which is `VelocityVariance` here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from fastdit.blocks.attention import AttentionCall, SeenAttention, weights_of
from fastdit.config import register
from fastdit.errors import InvalidConfig, UnsupportedModel
from fastdit.models.roles import text_comes_first
from fastdit.schedule.selectors.base import (
    Scene,
    Seen,
    Selector,
    TextExchange,
)


@register
@dataclasses.dataclass(frozen=True)
class TextAttention(Selector):
    """The attention between an image token and the prompt's at the last coarse step, mean over heads and blocks.

    All forwards of the step count alike, so it is the mean over guidance's branches. Works where every block attends to
    text and image together in torch's `scaled_dot_product_attention`, as in FLUX.1 and SD3; engines hide that and are
    refused. After AViTS (2026).

    Args:
        direction: "received" scores an image token by what the text's tokens give to it, "given" by the share of its
            own attention that goes to the text.

    Raises:
        InvalidConfig: for another word.
        UnsupportedModel: where the model's blocks are not described in `fastdit.models.roles`.

    >>> TextAttention("given")
    TextAttention(direction='given')
    """

    direction: Literal["received", "given"] = "received"

    sees: ClassVar[Seen | None] = Seen.TEXT_ATTENTION

    def check(self, transformer: nn.Module) -> None:
        if text_comes_first(transformer) is None:
            raise UnsupportedModel(
                f"TextAttention must know where the text's tokens are in attention, and the blocks of "
                f"{type(transformer).__name__} are not described, or don't attend to text and image together; describe "
                "them in fastdit.models.roles.TOKEN_ROLES, or choose by PixelGradient() or VelocityVariance()"
            )

    def scores(self, scene: Scene) -> torch.Tensor:
        if scene.exchange is None:
            raise InvalidConfig(
                "TextAttention reads the last step of a coarse stage, and there was none before the mixed one; start "
                "at a higher strength, or use Edges()"
            )
        return scene.exchange.received if self.direction == "received" else scene.exchange.given


class SeenExchange(SeenAttention):
    """Reads what `tokens` image tokens exchange with the text in each joint attention of one forward.

    `appended` tokens of other pictures follow the image's. Attention of the image to itself is left alone.
    """

    def __init__(self, tokens: int, appended: int, *, text_first: bool) -> None:
        super().__init__(self._read)
        self._tokens, self._appended, self._text_first = tokens, appended, text_first
        self._given: list[torch.Tensor] = []
        self._received: list[torch.Tensor] = []

    def _read(self, call: AttentionCall) -> torch.Tensor | None:
        length, heads = call.query.shape[2], call.query.shape[1]
        pictures = self._tokens + self._appended
        if length <= pictures or call.key.shape[2] != length:
            return None
        start = length - pictures if self._text_first else 0
        image = slice(start, start + self._tokens)
        text = slice(0, start) if self._text_first else slice(pictures, length)
        mean = sum(weights_of(call), call.query.new_zeros(1, dtype=torch.float32)) / heads
        self._given.append(mean[:, image, text].sum(dim=2))
        self._received.append(mean[:, text, image].mean(dim=1))
        return call.by_torch()

    def mean(self, images: int) -> TextExchange:
        """Give the mean over blocks and over the several batches of `images` in a row (guidance)."""
        given, received = (
            torch.stack(each).mean(dim=0).unflatten(0, (-1, images)).mean(dim=0)
            for each in (self._given, self._received)
        )
        return TextExchange(given, received)


def mean_exchange(forwards: Sequence[SeenExchange], images: int) -> TextExchange | None:
    """Give the mean over the forwards of a step; None where there were none."""
    if not forwards:
        return None
    means = [forward.mean(images) for forward in forwards]
    return TextExchange(
        torch.stack([mean.given for mean in means]).mean(dim=0),
        torch.stack([mean.received for mean in means]).mean(dim=0),
    )
