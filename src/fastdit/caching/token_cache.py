"""The token-cache level: which image tokens are recomputed inside the blocks of a step that runs.

    computed   every child of every block runs on every token; the outputs of the children are kept
    partial    attention is not run (its kept output stands in); the feed-forward runs on the chosen tokens only and
               their rows replace those of its kept output
    reused     blocks are not run: output = input + the residual that the block had when it last ran

A block runs as its class's own forward on a structural twin whose children are stood in for; which child plays which
part is data (`fastdit.models.tokens`). State is per run, denoiser, branch and stage, and void when shapes change.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.accelerator import Accelerator, Break, Change, Level, Need, is_count
from fastdit.errors import FastditWarning, IncompatibleStack, InvalidConfig, UnsupportedModel
from fastdit.layout import TokenLayout, gather_tokens
from fastdit.models.tokens import Role, TokenRoles, token_roles
from fastdit.run import Outcome, Run, StepContext
from fastdit.structure import map_tensors, structural_twin, tensors_of

from .attention_scores import AttentionScore, watching
from .step_cache import STAGE_CHANGES

COMPUTED, PARTIAL, REUSED = "computed", "partial", "reused"


@dataclasses.dataclass
class BlockMemory:
    """What is kept of one block: its children's outputs, when each token was refreshed, and its scores.

    `refreshed` holds for each token [B, N] the step at which it was last recomputed; `place` is the block's number
    among those that run, `shape` counts images and tokens, `streams` are the shapes that came in. `score` [B, N] is of
    the last full step, `residual` of the last step that ran the block.
    """

    place: int
    roles: TokenRoles
    shape: tuple[int, int]
    streams: tuple[torch.Size, ...]
    full_step: int = -1
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    refreshed: torch.Tensor | None = None
    score: torch.Tensor | None = None
    residual: tuple[torch.Tensor | None, ...] = ()

    @property
    def text(self) -> int:
        """How many tokens of the text come before the image's in what the children of a joined block see."""
        roles = self.roles
        if not roles.joined or roles.text not in roles.returns:
            return 0
        return self.streams[roles.returns.index(roles.text)][1]

    def lift(self, lifted: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> None:
        """Copy all that is kept of the image to `tokens` new tokens; `lifted` does that for [B, N, ...]."""
        text, image = self.text, self.roles.returns.index(self.roles.image)

        def after_text(output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :text], lifted(output[:, text:])], dim=1) if text else lifted(output)

        for name in self.kept.keys() - set(self.roles.text_children):
            self.kept[name] = _first(self.kept[name], after_text)
        if self.refreshed is not None:
            self.refreshed = lifted(self.refreshed)
        if self.score is not None:
            self.score = lifted(self.score)
        self.residual = tuple(
            lifted(part) if place == image and part is not None else part for place, part in enumerate(self.residual)
        )
        self.shape = (self.shape[0], tokens)
        shape = self.streams[image]
        self.streams = (*self.streams[:image], torch.Size((shape[0], tokens, *shape[2:])), *self.streams[image + 1 :])


@dataclasses.dataclass
class TokenState:
    """All that a token cache keeps for one denoiser, branch and stage. `settled` is False inside a forward."""

    blocks: dict[tuple[str, int], BlockMemory] = dataclasses.field(default_factory=dict)
    generator: torch.Generator | None = None
    centroids: torch.Tensor | None = None
    clusters: torch.Tensor | None = None
    settled: bool = True

    def tensors(self) -> list[torch.Tensor]:
        """List every tensor that is kept."""
        return tensors_of([[vars(memory) for memory in self.blocks.values()], self.centroids, self.clusters])

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        """Bring kept outputs, ages, scores and clusters to another token layout."""

        def lifted(values: torch.Tensor) -> torch.Tensor:
            index = sources.to(values.device).repeat(values.shape[0] // len(sources), 1)
            wide = index.reshape(*index.shape, *(1,) * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
            return values.gather(1, wide)

        for memory in self.blocks.values():
            memory.lift(lifted, sources.shape[1])
        if self.clusters is not None:
            self.clusters = lifted(self.clusters)

    def drop(self) -> None:
        """Forget everything."""
        self.blocks.clear()
        self.generator = self.centroids = self.clusters = None
        self.settled = True

    def uniform(self, tokens: int, seed: int, device: torch.device) -> torch.Tensor:
        """Draw one number of [0, 1) a token from the run's own generator, the same for every image: [1, N]."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(1, tokens, generator=self.generator, device=device)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where a token cache stands when it chooses the tokens of one block. `grid` is None where tokens form none."""

    state: TokenState
    memory: BlockMemory
    context: StepContext
    device: torch.device
    grid: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class TokenCache(Accelerator):
    """Base of the token caches: every `interval`-th step is full, and so are the first `first` of the run.

    The first step of a stage is full too, unless `stage_change` is "carry": then all that is kept is copied to the new
    tokens where a schedule changes them. A subclass chooses the tokens of the steps between, and may leave the blocks
    out altogether in some of them.
    """

    interval: int = 4
    _: dataclasses.KW_ONLY
    first: int = 3
    seed: int = 0
    stage_change: str = "reset"

    level: ClassVar = Level.TOKEN_CACHE
    changes: ClassVar = frozenset({Change.BLOCK_PARTS})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.FIXED_ROWS, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS})

    #: Whether some steps leave the blocks out, so that their residuals must be kept.
    reuses_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not is_count(self.interval, 1):
            raise InvalidConfig(f"{name}'s interval counts steps from one full step to the next, got {self.interval!r}")
        if self.stage_change not in STAGE_CHANGES:
            raise InvalidConfig(f"stage_change is one of {', '.join(STAGE_CHANGES)}, got {self.stage_change!r}")
        if not is_count(self.first) or not is_count(self.seed):
            raise InvalidConfig(f"{name}'s first and seed are whole numbers from 0, got {self.first!r}, {self.seed!r}")

    @property
    def neutral(self) -> bool:
        return self.interval == 1

    @property
    def watches(self) -> AttentionScore | None:
        """Which score of the attention is taken at full steps, if any."""
        return None

    @property
    def wants_grid(self) -> bool:
        """Whether the choice of tokens looks at where they lie."""
        return False

    def interval_at(self, context: StepContext) -> int:
        """How many steps lie between a full step and the next, as seen from one step."""
        return self.interval

    def phase(self, context: StepContext, since: int) -> str:
        """Say what a block does that was last run in full `since` steps ago (at least one)."""
        return COMPUTED if since >= self.interval_at(context) else PARTIAL

    def choose(self, choice: Choice) -> torch.Tensor | None:
        """Choose the tokens of one block: raster indices [B, K]; None where the block had better run in full."""
        raise NotImplementedError

    def merge(self, kept: torch.Tensor, fresh: torch.Tensor, index: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Put fresh rows [B, K, C] of image tokens into a copy of the kept ones [B, N, C]."""
        return kept.scatter(1, index[..., None].expand_as(fresh), fresh)

    def learn(self, state: TokenState, image: torch.Tensor) -> None:
        """Take in the image tokens [B, N, C] as they leave the blocks of a full step."""

    def check(self, pipeline: Any, transformer: Any) -> None:
        for name, child in transformer.named_children():
            if isinstance(child, nn.ModuleList):
                for block in child:
                    if token_roles(block) is None:
                        raise UnsupportedModel(_undescribed(self, f"{type(transformer).__name__}.{name}", block))


class TokenPass:
    """One forward under a token cache: answers the block calls of a structural twin.

    `end` says what the forward did.
    """

    def __init__(self, cache: TokenCache, run: Run) -> None:
        self._cache, self._run = cache, run

    def begin(self, context: StepContext, state: TokenState, layout: TokenLayout | None = None) -> None:
        """Start a forward. `layout` is where its image tokens lie, where that is known."""
        if not state.settled:
            state.drop()
        state.settled = False
        self._context, self._state, self._layout = context, state, layout
        self._image: torch.Tensor | None = None
        self._called: set[tuple[str, int]] = set()
        self._tally: list[tuple[int, int]] = []
        self._actions: set[str] = set()
        self._saved: dict[str, float] = {}
        self._reason = "no block was called"
        self._tokens: int | None = None

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block call: run it in full or on the chosen tokens, or give its input and kept residual."""
        if not issubclass(type(block), nn.Module):
            return block(*args, **kwargs)  # something that stands in for a block has no children to run
        roles = token_roles(block)
        if roles is None:
            raise UnsupportedModel(_undescribed(self._cache, f"{name}.{index}", block))
        if (name, index) in self._called:
            raise IncompatibleStack(
                f"{name}.{index} is called more than once in a forward, so what is kept of it would be of another "
                f"call; leave {type(self._cache).__name__} out of the stack"
            )
        self._called.add((name, index))
        _refuse_own_behaviour(block, f"{name}.{index}")
        values = _signature(type(block).forward).bind(None, *args, **kwargs).arguments
        image = values[roles.image]
        self._tokens = image.shape[1] if self._tokens is None else self._tokens
        memory = self._memory((name, index), roles, image, tuple(values[stream].shape for stream in roles.returns))
        action, reason = self._decide(memory)
        chosen = None
        if action == PARTIAL:
            grid = self._grid(image.shape[1])
            chosen = self._cache.choose(Choice(self._state, memory, self._context, image.device, grid))
            if chosen is None:
                action, reason = COMPUTED, "no scores"
        if action == REUSED:
            self._saved[f"{name}.{index}"] = 1.0
            output = _with_residual(roles, values, memory)
        else:
            text = values[roles.text].shape[1] if roles.joined and roles.text is not None else 0
            visit = _Visit(self._cache, self._state, roles, memory, chosen, text, f"{name}.{index}")
            output = visit.twin(block)(*args, **kwargs)
            self._saved.update(visit.saved)
            self._refresh(roles, memory, values, output, chosen)
        ran = 0 if action == REUSED else image.shape[1] if chosen is None else chosen.shape[1]
        self._tally.append((ran, image.shape[1]))
        self._actions.add(action)
        self._reason = reason
        self._image = _stream(roles, output, roles.image)
        return output

    def end(self) -> Outcome:
        """Close the forward, whose results count from now on, and say what was done."""
        action = PARTIAL if len(self._actions) > 1 else next(iter(self._actions), COMPUTED)
        if action == PARTIAL:
            ran, tokens = (sum(counts) for counts in zip(*self._tally, strict=True))
            self._reason = f"{ran / tokens:.1%} of the tokens, {self._reason}"
        blocks = self._state.blocks.values()
        if self._image is not None and all(memory.full_step == self._context.step for memory in blocks):
            self._cache.learn(self._state, self._image)
        self._image = None
        self._state.settled = True
        return Outcome(action, self._reason, self._saved, self._tokens)

    def _memory(
        self, key: tuple[str, int], roles: TokenRoles, image: torch.Tensor, streams: tuple[torch.Size, ...]
    ) -> BlockMemory:
        """Get what is kept of a block, nothing where streams of other shapes come in."""
        blocks, shape = self._state.blocks, (image.shape[0], image.shape[1])
        if key not in blocks:
            blocks[key] = BlockMemory(len(blocks), roles, shape, streams)
        elif blocks[key].streams != streams:
            blocks[key] = BlockMemory(blocks[key].place, roles, shape, streams)
            self._state.generator = self._state.centroids = self._state.clusters = None
        return blocks[key]

    def _decide(self, memory: BlockMemory) -> tuple[str, str]:
        context = self._context
        if context.step < self._cache.first:
            return COMPUTED, "first steps"
        if memory.full_step < 0:
            return COMPUTED, "first step of a stage" if context.stage_step == 0 else "no history"
        since = context.step - memory.full_step
        plural = "s" if since > 1 else ""
        return self._cache.phase(context, since), f"{since} step{plural} after a full one"

    def _refresh(
        self, roles: TokenRoles, memory: BlockMemory, values: Mapping[str, Any], output: Any, chosen: Any
    ) -> None:
        """Note what a block that ran has refreshed."""
        step = self._context.step
        if chosen is None:
            memory.full_step = step
            memory.refreshed = torch.full(memory.shape, step, device=values[roles.image].device)
        else:
            assert memory.refreshed is not None
            memory.refreshed = memory.refreshed.scatter(1, chosen, step)
        if self._cache.reuses_blocks:
            streams = [_stream(roles, output, stream) for stream in roles.returns]
            memory.residual = tuple(
                None if out is None else out - values[stream]
                for out, stream in zip(streams, roles.returns, strict=True)
            )

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Give the rows and columns of the image tokens; None where they form no plain grid that is known."""
        if not self._cache.wants_grid:
            return None
        layout = self._layout
        if layout is not None and not layout.mixed and layout.tokens == tokens:
            scale = 2 if layout.coarse else 1
            return layout.rows // scale, layout.columns // scale
        side = math.isqrt(tokens)
        if layout is None and side * side == tokens:
            return side, side
        if self._context.stage not in self._run.stages_without_grid:
            self._run.stages_without_grid.add(self._context.stage)
            self._warn_of_no_grid(tokens)
        return None

    def _warn_of_no_grid(self, tokens: int) -> None:
        warnings.warn(
            f"{self._cache.describe()}: the {tokens} image tokens of stage {self._context.stage} form no plain grid, "
            "so no spatial bonus is given in it; set spatial_bonus=0 if that is meant",
            FastditWarning,
            stacklevel=2,
        )


class _Visit:
    """One run of one block: stands between the block's forward and its children.

    `chosen` holds the image tokens to recompute, None for all of them; `text` counts the tokens of the text that come
    before the image's in what the children see.
    """

    def __init__(
        self,
        cache: TokenCache,
        state: TokenState,
        roles: TokenRoles,
        memory: BlockMemory,
        chosen: torch.Tensor | None,
        text: int,
        path: str,
    ) -> None:
        self._cache, self._state, self._roles, self._memory = cache, state, roles, memory
        self._chosen, self._text, self._path = chosen, text, path
        self._called: set[str] = set()
        self.saved: dict[str, float] = {}

    def twin(self, block: nn.Module) -> nn.Module:
        """Give the block's structural twin whose children answer through this visit."""
        children = {
            name: _ChildTwin(self, name, role, child)
            for name, role in self._roles.roles.items()
            if (child := block._modules.get(name)) is not None
        }
        return structural_twin(block, children)

    def answer(self, name: str, role: Role, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def _in_full(self, name: str, role: Role, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def _in_part(self, name: str, role: Role, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def __init__(self, visit: _Visit, name: str, role: Role, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.__dict__["_answer"] = lambda args, kwargs: visit.answer(name, role, child, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_answer"](args, kwargs)


def _first(kept: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to a child's output, or to the first of several."""
    return function(kept) if isinstance(kept, torch.Tensor) else type(kept)([function(kept[0]), *kept[1:]])


@lru_cache(maxsize=64)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def _stream(roles: TokenRoles, output: Any, stream: str) -> Any:
    """Take one stream (named as the argument by which it came) out of a block's result; None where it ends."""
    return output if isinstance(output, torch.Tensor) else output[roles.returns.index(stream)]


def _with_residual(roles: TokenRoles, values: Mapping[str, Any], memory: BlockMemory) -> Any:
    """Give what a block would return, from its input and its kept residual."""
    streams = tuple(
        None if residual is None else values[stream] + residual
        for residual, stream in zip(memory.residual, roles.returns, strict=True)
    )
    return streams if len(streams) > 1 else streams[0]


def _undescribed(cache: TokenCache, where: str, block: Any) -> str:
    return (
        f"{cache.describe()} recomputes tokens inside blocks, and fastdit has no description of {type(block).__name__} "
        f"({where}); say which of its children are attention and feed-forward in a TokenRoles entry of "
        "fastdit.models.tokens.TOKEN_ROLES, or use an accelerator that treats blocks as a whole"
    )


def _refuse_own_behaviour(block: nn.Module, where: str) -> None:
    """Raise where something sits on the block object that a structural twin would leave out."""
    if "forward" in block.__dict__ or block.__dict__.get("_compiled_call_impl") is not None:
        raise IncompatibleStack(
            f"{where} ({type(block).__name__}) has a forward of its own (an offloading hook, or compilation), and a "
            "token cache runs the parts of a block by themselves; offload whole models or leaves instead of blocks, "
            "don't compile the blocks, or leave the token cache out"
        )
