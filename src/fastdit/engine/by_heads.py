"""Attention a few heads at a time, as two products of whole matrices around a softmax: for processors.

    out[h] = softmax(scale q[h] k[h]^T) v[h]

torch's own kernel for processors multiplies small blocks, and where the processor has no matrix units it does that at
a fifth of the speed that whole matrices are multiplied at. The scores of a few heads, or of some rows of one, are small
enough to stay in the processor's cache between the three passes over them. They are rounded to the model's precision
before the softmax, which torch's kernel does not do.

It is an operator of torch's, so that compilers take it as one call and look no further.
"""

from __future__ import annotations

import torch

from fastdit.blocks.attention import AttentionCall

#: How large the scores are that are worked on at a time, in bytes, and how many rows of a head at least.
_BYTES, _ROWS = 2**22, 32


def takes(call: AttentionCall) -> bool:
    """Whether a call is one that can be computed by heads: on a processor, without a mask or other options."""
    plain = call.attn_mask is None and call.dropout_p == 0.0 and not call.is_causal and not call.enable_gqa
    return plain and call.query.device.type == "cpu" and call.query.shape[:2] == call.key.shape[:2]


def attend_by_heads(call: AttentionCall) -> torch.Tensor:
    """Compute attention [B, H, S, D_v] of a call that `takes` allows, in the queries' dtype."""
    scale = call.query.shape[3] ** -0.5 if call.scale is None else call.scale
    found: torch.Tensor = _operator(call.query, call.key, call.value, scale)
    return found


@torch.library.custom_op("fastdit::attention_by_heads", mutates_args=())
def _operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    room = _BYTES // (keys * query.element_size())
    rows = min(queries, max(_ROWS, room))
    count = min(heads, max(1, room // rows))
    output = _empty(query, value)
    scores, weights = query.new_empty(2, count, rows, keys)
    for image in range(query.shape[0]):
        for head in range(0, heads, count):
            some = slice(head, head + count)
            for start in range(0, queries, rows):
                part = query[image, some, start : start + rows]
                score, weight = (buffer[: part.shape[0], : part.shape[1]] for buffer in (scores, weights))
                torch.baddbmm(score, part, key[image, some].mT, beta=0, alpha=scale, out=score)
                torch.softmax(score, dim=2, out=weight)
                torch.bmm(weight, value[image, some], out=output[image, some, start : start + rows])
    return output


@_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return _empty(query, value)


def _empty(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Make room for the output, laid out with the heads of a token side by side, as models go on with it."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
