"""SD3 on tokens at any places, written out in a straight line: one image, one prompt, nothing shared with the package.

It stands in for the transformer in `reference_ralu.ralu`: the patch embedding is a matrix product, the positions are
sines and cosines in double precision, guidance is two forwards, and the blocks are called in a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Places = Sequence[tuple[float, float]]


def position_embedding(places: Places, width: int, *, side: int, base: int, scale: float = 1.0) -> Tensor:
    """The embedding at indices (row, column) of a table of `side` x `side`: the column's half, then the row's."""
    step = base / side / scale
    frequencies = [10000.0 ** -(4 * k / width) for k in range(width // 4)]
    rows = []
    for row, column in places:
        halves = []
        for index in (column, row):
            angles = torch.tensor([index * step * frequency for frequency in frequencies], dtype=torch.float64)
            halves += [angles.sin(), angles.cos()]
        rows.append(torch.cat(halves))
    return torch.stack(rows).float()


def crop_corner(rows: int, columns: int, side: int) -> tuple[int, int]:
    return (side - rows) // 2, (side - columns) // 2


def in_fine_frame(places: Places, coarse_tokens: int) -> list[tuple[float, float]]:
    """Places of a coarse or mixed stage, given in the coarse frame: children whole, coarse tokens in their middle."""
    refined = (len(places) - coarse_tokens) // 3
    kept = coarse_tokens - refined
    return [
        (2.0 * row + (0.5 if number < kept else 0.0), 2.0 * column + (0.5 if number < kept else 0.0))
        for number, (row, column) in enumerate(places)
    ]


def forward(
    transformer: Any, tokens: Tensor, places: Places, timestep: Tensor, prompt: Tensor, pooled: Tensor,
    skip: Collection[int] = (),
) -> Tensor:  # fmt: skip
    """Tokens [N, C p p] at indices of the table -> their velocities, in the same order of channels."""
    config, embed = transformer.config, transformer.pos_embed
    width = embed.proj.weight.shape[0]
    stream = tokens @ embed.proj.weight.reshape(width, -1).T + embed.proj.bias
    side = config.pos_embed_max_size
    stream = stream + position_embedding(places, width, side=side, base=config.sample_size // config.patch_size)
    stream, text = stream[None], transformer.context_embedder(prompt[None])
    embedding = transformer.time_text_embed(timestep, pooled[None])
    for number, block in enumerate(transformer.transformer_blocks):
        if number not in skip:
            text, stream = block(hidden_states=stream, encoder_hidden_states=text, temb=embedding)
    stream = transformer.proj_out(transformer.norm_out(stream, embedding))[0]
    return stream.reshape(len(tokens), -1, transformer.out_channels).transpose(1, 2).reshape(len(tokens), -1)


def guided(
    pipe: Any,
    call: dict[str, Any],
    *,
    steps: tuple[int, int, int],
    frame: str = "coarse",
    skip_layers: Collection[int] = (),
    skip_steps: Collection[int] = (),
    skip_scale: float = 2.8,
) -> Callable[..., Tensor]:
    """What stands in for the transformer of `reference_ralu.ralu` in one call of an SD3 pipeline."""
    rows, columns = call["height"] // 16, call["width"] // 16
    side = pipe.transformer.config.pos_embed_max_size

    def velocity(
        *, image: int, step: int, hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, **_: Any
    ) -> Tensor:
        places = [(float(row), float(column)) for _, row, column in img_ids.tolist()]
        extent = (rows, columns)
        if step < steps[0] + steps[1]:
            if frame == "fine":
                places = in_fine_frame(places, rows * columns // 4)
            else:
                extent = (rows // 2, columns // 2)
        top, left = crop_corner(*extent, side)
        places = [(top + row, left + column) for row, column in places]

        def at(kind: str, skip: Collection[int] = ()) -> Tensor:
            prompt, pooled = call[f"{kind}prompt_embeds"][image], call[f"{kind}pooled_prompt_embeds"][image]
            return forward(pipe.transformer, hidden_states[0], places, timestep * 1000, prompt, pooled, skip)

        with_prompt = at("")
        if call["guidance_scale"] <= 1.0:
            return with_prompt[None]
        without = at("negative_")
        found = without + call["guidance_scale"] * (with_prompt - without)
        if step in skip_steps:
            found = found + (with_prompt - at("", skip_layers)) * skip_scale
        return found[None]

    return velocity


def shape_only(pipe: Any) -> Any:
    """What `reference_ralu.ralu` reads of a transformer."""
    channels = 4 * pipe.transformer.config.in_channels
    return SimpleNamespace(config=SimpleNamespace(in_channels=channels, guidance_embeds=False))
