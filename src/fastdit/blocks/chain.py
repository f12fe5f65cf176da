"""The chain: what every level of a stack does to a forward and to the blocks in it, folded into one call.

Each level gives a `Pass` for a run. A pass stands around what is inside of it, twice: around the forward of a
transformer, and around every call of a block. The chain folds both in the order of the levels, outermost first, so that
no pass knows another; what a pass opens in `forward` it closes there in a `finally`, which unwinds in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.errors import NoActiveRun
from fastdit.nested import Args, Kwargs, Value, select_rows, tensors_of
from fastdit.record import Outcome
from fastdit.step import OUTSIDE, StepContext
from fastdit.structure import refuse_replaced_forward, structural_twin

#: Arguments of forwards that hold one text a layer of its encoder, [layers, B, ...].
_BY_LAYER = frozenset({"encoder_hidden_states_llama3"})


@dataclass(slots=True)
class BlockCall:
    """A block of a forward is called: block `index` of the list `name`, with these arguments.

    `children` stand in for parts of the block in this call. `whole` asks that every token be computed anew, since a
    decision will be read off the result.
    """

    name: str
    index: int
    block: nn.Module
    args: Args
    kwargs: Kwargs
    children: Mapping[str, Value] | None = None
    whole: bool = False


@dataclass(slots=True)
class ForwardCall:
    """A transformer is called in a run: where it stands, its arguments by name, the children that a layout replaces.

    A schedule puts its stage's own in their place; what is inside of it, and the record, see those.
    `select` gives the call for some samples of its batch, of which it gets the places [K].
    """

    module: nn.Module
    name: str
    step: StepContext
    arguments: Kwargs
    children: Kwargs = field(default_factory=dict)
    select: Callable[[ForwardCall, torch.Tensor], ForwardCall] | None = None

    @property
    def latents(self) -> Value:
        """The first argument, which is where every diffusers transformer takes its latents: a tensor, or a list."""
        return next(iter(self.arguments.values()))

    @property
    def device(self) -> torch.device:
        """Where the forward's latents are."""
        latents = self.latents
        return latents.device if isinstance(latents, torch.Tensor) else tensors_of(latents)[0].device

    def with_arguments(self, arguments: Kwargs) -> ForwardCall:
        """Give this call with other arguments."""
        return ForwardCall(self.module, self.name, self.step, arguments, self.children, self.select)

    def of_samples(self, index: torch.Tensor, batch: int) -> ForwardCall:
        """Give the call for the samples at `index` [K] of a batch."""
        chosen = self.with_arguments(
            {name: select_rows(value, index, batch, int(name in _BY_LAYER)) for name, value in self.arguments.items()}
        )
        return chosen if self.select is None else self.select(chosen, index)


Forward = Callable[[ForwardCall], Any]
"""Runs a forward, and whatever is inside of it."""

Block = Callable[[BlockCall], Any]
"""Runs a block, and whatever is inside of it."""


class Pass:
    """What one level of a stack does in a run; by default nothing. Made for a run, it owns what it keeps for it.

    A subclass that acts overrides `forward` or `block`, and calls `next` for what is inside, or does not.
    """

    #: Whether the pass acts outside of the hooks that other libraries put on the module, as one does that skips it.
    outside_hooks: ClassVar[bool] = False

    @property
    def acts_on_blocks(self) -> bool:
        """Whether the pass answers blocks, and not forwards alone."""
        return type(self).block is not Pass.block

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        """Answer a forward."""
        return next(call)

    def block(self, call: BlockCall, next: Block) -> Value:
        """Answer a block of a forward."""
        return next(call)

    def outcome(self) -> Outcome | None:
        """Say once what was done in the last forward; None where it did not get here, or nothing is to be said."""
        return None

    def settled(self, call: ForwardCall, outcome: Outcome) -> None:
        """Take in what a whole forward came to. Raises where that shows that the pass could not act."""

    def close(self) -> None:
        """Let go of what was kept for the run, at its end, however that came."""

    def idle(self) -> str | None:
        """Say, at the end of a run, why the pass gained nothing in it, and what to do; None where it acted."""
        return None


class Chain:
    """The passes of a run, outermost first, as one function of a forward.

    `outside` is the chain of those that also act on a forward outside of the pipeline's loop, which is no step.
    """

    def __init__(self, passes: Sequence[Pass], outside: Chain | None = None) -> None:
        self.passes, self._outside = tuple(passes), outside
        self.acts_on_blocks = any(one.acts_on_blocks for one in passes)
        self._stacks: dict[tuple[int, str], tuple[list[nn.Module | None], BlockStack]] = {}
        #: The blocks that the model called in the last forward, by path; none where nothing acts on blocks.
        self.called: list[str] = []
        self._block: Block = run_block
        self._forward: Forward = self._execute
        for one in reversed(self.passes):
            if one.acts_on_blocks:
                self._block = partial(one.block, next=self._block)
            if type(one).forward is not Pass.forward:
                self._forward = partial(one.forward, next=self._forward)
        self._telling = [one for one in reversed(self.passes) if type(one).outcome is not Pass.outcome]
        self._settling = [one for one in self.passes if type(one).settled is not Pass.settled]

    def run(self, call: ForwardCall) -> tuple[Any, Outcome]:
        """Run a forward through all passes, and say what was done in it."""
        self.called.clear()
        if call.step.step == OUTSIDE and self._outside is not None:
            done = self._outside.run(call)
            self.called += self._outside.called
            return done
        modes = torch._C._len_torch_function_stack()
        try:
            output = self._forward(call)
        finally:
            while torch._C._len_torch_function_stack() > modes:  # an interrupt came while a pass's mode was left
                torch._C._pop_torch_function_stack()
        found: Outcome | None = None
        for one in self._telling:
            own = one.outcome()
            if own is not None:
                found = own.around(found)
        outcome = found if found is not None else Outcome()
        for one in self._settling:
            one.settled(call, outcome)
        return output, outcome

    def close(self) -> None:
        """End the run: the passes let go in reverse, and nothing holds them in a circle."""
        self._forward, self._block = _closed, run_block
        self._stacks.clear()
        if self._outside is not None:
            self._outside.close()
        for one in reversed(self.passes):
            one.close()

    def idle(self) -> Iterator[str]:
        """Say of each pass that gained nothing why it did not."""
        for one in self.passes:
            if (why := one.idle()) is not None:
                yield why

    def _execute(self, call: ForwardCall) -> Value:
        """Run the class's own forward: the module itself, or a structural twin whose blocks call the chain."""
        module = call.module
        if not (self.acts_on_blocks or call.children):
            return module(**call.arguments)
        if not self.acts_on_blocks:
            return structural_twin(module, call.children)(**call.arguments)
        return structural_twin(module, {**self._block_stacks(module), **call.children})(**call.arguments)

    def _block_stacks(self, module: nn.Module) -> dict[str, BlockStack]:
        """Give the stand-ins of a module's block lists, made anew where the blocks are others than before."""
        stacks = {}
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and len(child._modules):
                blocks: list[nn.Module | None] = list(child._modules.values())
                known = self._stacks.get((id(module), name))
                if known is None or known[0] != blocks:
                    known = blocks, BlockStack(child, name, self._block, self.called)
                    self._stacks[id(module), name] = known
                stacks[name] = known[1]
        return stacks


def _closed(call: ForwardCall) -> Value:
    raise NoActiveRun(f"{call.name} was called through a run that has ended; open another one")


def run_block(call: BlockCall) -> Value:
    """Run a block as it is, its children stood in for where the call says so."""
    block = call.block
    if call.children:
        refuse_replaced_forward(block, f"{call.name}.{call.index}")
        block = structural_twin(block, call.children)
    return block(*call.args, **call.kwargs)


class BlockStack(nn.ModuleList):
    """A block list whose items are handed out as proxies; the children themselves are the model's own.

    The path of every block that is called is added to `called`.
    """

    def __init__(self, blocks: nn.ModuleList, name: str, answer: Block, called: list[str]) -> None:
        # The list's own attributes, its children among them; the constructor would make empty ones.
        self.__dict__.update(blocks.__dict__)
        self.__dict__["_proxies"] = [
            _BlockProxy(answer, called, name, index, block) for index, block in enumerate(blocks._modules.values())
        ]

    def __iter__(self) -> Iterator[Value]:
        return iter(self.__dict__["_proxies"])

    def __getitem__(self, index: Any) -> Value:
        return self.__dict__["_proxies"][index]


class _BlockProxy:
    """Hands a block's calls to the chain; whatever else is asked of it is the block's own."""

    __slots__ = ("_answer", "_block", "_called", "_index", "_name", "_path")

    def __init__(self, answer: Block, called: list[str], name: str, index: int, block: Any) -> None:
        self._answer, self._called, self._block = answer, called, block
        self._name, self._index, self._path = name, index, f"{name}.{index}"

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        self._called.append(self._path)
        return self._answer(BlockCall(self._name, self._index, self._block, args, kwargs))

    def __getattr__(self, name: str) -> Value:
        return getattr(self._block, name)


def with_answers(module: nn.Module, answer: Block, children: Mapping[str, Value]) -> nn.Module:
    """Give a structural twin of `module`, without hooks, whose direct block lists hand their calls to `answer`."""
    stacks = {
        name: BlockStack(child, name, answer, [])
        for name, child in module._modules.items()
        if isinstance(child, nn.ModuleList) and len(child._modules)
    }
    return structural_twin(module, {**stacks, **children}, hooks=False)
