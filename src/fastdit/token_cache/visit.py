"""One run of one block under a token cache: what stands between the block's forward and its children."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdit.blocks.chain import BlockCall
from fastdit.errors import IncompatibleStack
from fastdit.layout import gather_tokens
from fastdit.models.roles import Role, TokenRoles
from fastdit.nested import Args, ArgumentNames, Kwargs, Value, map_tensors
from fastdit.token_cache.attention_scores import watching
from fastdit.token_cache.memory import BlockMemory, TokenState

if TYPE_CHECKING:
    from fastdit.token_cache.base import TokenCache


class Visit:
    """One run of one block: stands between the block's forward and its children.

    `chosen` holds the image tokens to recompute, None for all of them; `text` counts the tokens of the text that come
    before the image's in what the children see.
    """

    def __init__(
        self,
        cache: TokenCache,
        state: TokenState,
        memory: BlockMemory,
        chosen: torch.Tensor | None,
        text: int,
        path: str,
    ) -> None:
        self._cache, self._state, self._roles, self._memory = cache, state, memory.roles, memory
        self._chosen, self._text, self._path = chosen, text, path
        self._called: set[str] = set()
        self.saved: dict[str, float] = {}

    def children(self, block: nn.Module) -> dict[str, nn.Module]:
        """Give what stands in for the block's children and answers through this visit."""
        return {
            name: _ChildTwin(self, name, role, child)
            for name, role in self._roles.roles.items()
            if (child := block._modules.get(name)) is not None
        }

    def answer(self, name: str, role: Role, child: nn.Module, args: Args, kwargs: Kwargs) -> Value:
        """Answer the call of one child."""
        if name in self._called:
            raise IncompatibleStack(
                f"{self._path} calls its {name} more than once, as feed-forward chunking does, so its tokens can't be "
                "told apart; switch the chunking off, or leave the token cache out"
            )
        self._called.add(name)
        if self._chosen is None:
            return self._in_full(name, role, child, args, kwargs)
        return self._in_part(name, role, child, args, kwargs)

    def _in_full(self, name: str, role: Role, child: nn.Module, args: Args, kwargs: Kwargs) -> Value:
        roles, score = self._roles, self._cache.watches
        watched = score is not None and name == score.child(roles)
        if score is None or not watched:
            output = child(*args, **kwargs)
        else:
            with watching(score, self._memory.shape[1], roles) as seen:
                output = child(*args, **kwargs)
            self._memory.score = score.result(seen, output, self._memory.shape[1], self._text, f"{self._path}.{name}")
        if role is not Role.ENTRY:
            self._memory.kept[name] = output
        return output

    def _in_part(self, name: str, role: Role, child: nn.Module, args: Args, kwargs: Kwargs) -> Value:
        kept: Any = self._memory.kept.get(name)
        path = f"{self._path}.{name}"
        if role is Role.KEPT:
            self.saved[path] = 1.0
            return kept
        if role is Role.KEPT_CHOSEN:
            self.saved[path] = 1.0
            return map_tensors(kept, self._gathered)
        assert self._chosen is not None
        self.saved[path] = 1.0 - self._chosen.shape[1] / (self._text + self._memory.shape[1])
        hidden, *others = args
        fresh = child(hidden if role is Role.EXIT else self._gathered(hidden), *others, **kwargs)
        if role is Role.ENTRY:
            return fresh
        image = kept[:, self._text :]
        merged = self._cache.merge(image, fresh, self._chosen, self._state)
        if self._text:
            merged = torch.cat([kept[:, : self._text], merged], dim=1)
        self._memory.kept[name] = merged
        return merged

    def _gathered(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self._chosen is not None
        return gather_tokens(tokens, self._chosen + self._text)


class _ChildTwin(nn.Module):
    """Stands in for a child of a block and lets the visit answer."""

    def __init__(self, visit: Visit, name: str, role: Role, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.__dict__["_answer"] = lambda args, kwargs: visit.answer(name, role, child, args, kwargs)

    def forward(self, *args: Value, **kwargs: Value) -> Value:
        return self.__dict__["_answer"](args, kwargs)


def arguments_of(call: BlockCall) -> Kwargs:
    """Give the arguments of a block's call by their names."""
    return _names(type(call.block).forward)(call.args, call.kwargs)


@lru_cache(maxsize=64)
def _names(forward: Callable[..., Value]) -> ArgumentNames:
    return ArgumentNames(forward)


def stream_of(roles: TokenRoles, output: Value, stream: str) -> Value:
    """Take one stream (named as the argument by which it came) out of a block's result; None where it ends."""
    return output if isinstance(output, torch.Tensor) else output[roles.returns.index(stream)]


def with_residual(roles: TokenRoles, values: Mapping[str, Value], memory: BlockMemory) -> Value:
    """Give what a block would return, from its input and its kept residual."""
    streams = tuple(
        None if residual is None else values[stream] + residual
        for residual, stream in zip(memory.residual, roles.returns, strict=True)
    )
    return streams if len(streams) > 1 else streams[0]


def refuse_own_behaviour(block: nn.Module, where: str) -> None:
    """Raise where something sits on the block object that a structural twin would leave out."""
    if "forward" in block.__dict__ or block.__dict__.get("_compiled_call_impl") is not None:
        raise IncompatibleStack(
            f"{where} ({type(block).__name__}) has a forward of its own (an offloading hook, or compilation), and a "
            "token cache runs the parts of a block by themselves; offload whole models or leaves instead of blocks, "
            "don't compile the blocks, or leave the token cache out"
        )
