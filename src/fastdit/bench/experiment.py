"""What is measured, as data: pipelines x sizes x steps, and in each of these groups every stack on every prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Annotated, Any

from fastdit.bench.attribution import subset_name, subsets
from fastdit.bench.peers import PEERS
from fastdit.bench.source import Source
from fastdit.config import Config, Count, Positive, Range, Whole
from fastdit.errors import InvalidConfig
from fastdit.measure.likeness import Wanted
from fastdit.stack import Stack

#: Rounds below which no interval is worth printing.
FEWEST_ROUNDS = 3

#: A picture's height and width in pixels.
Size = Annotated[tuple[Count, ...], Range(at_least=2, at_most=2)]


@dataclass(frozen=True)
class Row:
    """One way of making a group's pictures: a stack, a peer of `PEERS`, or the untouched pipeline; with its steps."""

    name: str
    stack: Stack | None
    steps: int | None
    peer: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the untouched pipeline."""
        return self.stack is None and self.peer is None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "stack": None if self.stack is None else self.stack.to_json(),
            "steps": self.steps,
            "peer": self.peer,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Make a row of what `to_json` gave."""
        stack = None if data["stack"] is None else Stack.from_json(data["stack"])
        return cls(data["name"], stack, data["steps"], data["peer"])


@dataclass(frozen=True)
class Group:
    """Rows that make the same pictures and are compared: one pipeline, one size, one count of steps."""

    source: Source
    size: tuple[int, int] | None
    steps: int | None
    batch: int

    @property
    def title(self) -> str:
        size = "its own size" if self.size is None else f"{self.size[0]} x {self.size[1]} px"
        return f"{self.source.name}, {size}, {'its own' if self.steps is None else self.steps} steps"

    @property
    def key(self) -> str:
        """A name for files, another one for every other group."""
        return _key(self.title, asdict(self))

    def row_key(self, row: Row) -> str:
        """A name for a row's files within the group."""
        return _key(row.name, row.to_json())


def _key(title: str, content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9.]+', '-', title.lower()).strip('-')[:60]}-{digest}"


@dataclass(frozen=True)
class Experiment(Config):
    """A grid of measurements, which is refused as a whole before anything is loaded.

    Every stack of a group makes the pictures of the same prompts with the same seeds, in turns, beside the plain
    pipeline at its full steps and at as few as take equally long.

    Args:
        pipelines: at least one.
        stacks: by name.
        prompts: at least one; each is used with every seed.
        seeds: of the noise.
        sizes: heights and widths in pixels; the pipeline's own if left out.
        steps: counts of steps of the plain pipeline; its own if left out.
        batch: prompts a call.
        precision: the half width, as a part of it, to which a speed-up is to be known; rounds go on until then.
        minutes: how long rounds may go on for every group; what was prepared and begun is ended.
        rounds: how many there are at least; all prompts with all seeds if left out. Prompts are used again after that.
        isolate: give every row processes of its own.
        peers: run diffusers' own caches and compilation and cache-dit, too, each in processes of its own.
        attribute: run every subset of each stack, too, which tells what each part is worth.
        fidelity: "lpips" and "dinov2", each with "=WHERE" its weights are: likeness to the full run by networks, beside
            PSNR and SSIM. Nothing is downloaded for them.
        ssim_floor: a likeness to the plain pipeline's full run, 0 to 1, below which a row is rejected.

    Raises:
        InvalidConfig: for what can't be run, or shows nothing.
    """

    pipelines: tuple[Source, ...]
    stacks: Mapping[str, Stack]
    prompts: tuple[Annotated[str, Range(at_least=1)], ...]
    seeds: tuple[Whole, ...] = (0,)
    sizes: tuple[Size, ...] | None = None
    steps: tuple[Count, ...] | None = None
    batch: Count = 1
    precision: Positive = 0.02
    minutes: Positive = 8.0
    rounds: Annotated[int, Range(at_least=FEWEST_ROUNDS)] | None = None
    isolate: bool = False
    peers: bool = False
    attribute: bool = False
    fidelity: tuple[str, ...] = ()
    ssim_floor: Annotated[float, Range(at_least=0, at_most=1)] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def check_values(self) -> None:
        for name in ("pipelines", "stacks", "prompts", "seeds"):
            if not getattr(self, name):
                raise InvalidConfig(f"an experiment needs at least one of its {name}")
        if taken := [name for name in self.stacks if name.startswith("plain")]:
            raise InvalidConfig(f"the rows of the plain pipeline are called plain; call {taken[0]!r} otherwise")
        pictures = len(self.prompts) * len(self.seeds)
        if pictures % self.batch:
            raise InvalidConfig(
                f"{len(self.prompts)} prompts with {len(self.seeds)} seeds are {pictures} pictures, which fill no "
                f"whole calls of batch={self.batch}"
            )
        if self.ssim_floor is not None and pictures < 2:
            raise InvalidConfig("a floor is judged by an interval over pictures, and one picture gives none")
        self._check_fidelity()
        for size in self.sizes or ():
            self._check_size(size)

    def _check_fidelity(self) -> None:
        names = [Wanted.parsed(text).name for text in self.fidelity]
        if len(set(names)) < len(names):
            raise InvalidConfig(f"fidelity names each network once, got {', '.join(self.fidelity)}")

    def _check_size(self, size: tuple[int, ...]) -> None:
        height, width = size
        if height % 8 or width % 8:
            raise InvalidConfig(f"sizes: {height} x {width} px is none of a picture: both must be multiples of 8")
        for source, (name, stack) in product(self.pipelines, self.stacks.items()):
            if stack.schedule is not None and source.token_pixels is not None:
                try:
                    stack.schedule.plan(height // source.token_pixels, width // source.token_pixels, None)
                except InvalidConfig as error:
                    raise InvalidConfig(f"{name} can't make pictures of {height} x {width} px: {error}") from error

    @property
    def least_rounds(self) -> int:
        """How many rounds there are in any case: enough for every picture, and for an interval."""
        return max(FEWEST_ROUNDS, self.rounds_of_pictures if self.rounds is None else self.rounds)

    @property
    def rounds_of_pictures(self) -> int:
        """How many rounds make every prompt's picture with every seed once."""
        return len(self.prompts) * len(self.seeds) // self.batch

    def groups(self) -> Iterator[Group]:
        """Give the groups, one after another."""
        for source, size, steps in product(self.pipelines, self.sizes or (None,), self.steps or (None,)):
            yield Group(source, None if size is None else (size[0], size[1]), steps, self.batch)

    def rows(self, group: Group) -> list[Row]:
        """Give a group's rows: the plain pipeline first, then the stacks."""
        made = {name: stack for own in self.stacks for name, stack in self._with_subsets(own).items()}
        return [
            Row("plain", None, group.steps),
            *(Row(name, stack, group.steps if stack.schedule is None else None) for name, stack in made.items()),
            *(Row(name, None, group.steps, name) for name in (PEERS if self.peers else ())),
        ]

    def _with_subsets(self, name: str) -> dict[str, Stack]:
        """Give a stack by its name, and with `attribute` its subsets by theirs."""
        stack = self.stacks[name]
        parts = subsets(stack) if self.attribute and len(stack) > 1 else {}
        return {name: stack} | {subset_name(name, stack, one): part for one, part in parts.items() if part != stack}

    def inputs(self, number: int) -> tuple[list[str], list[int]]:
        """Give the prompts and the seeds of a round; after the last picture the first one's turn comes again."""
        pictures = list(product(self.seeds, range(len(self.prompts))))
        first = number * self.batch % len(pictures)
        chosen = pictures[first : first + self.batch]
        places = len(self.prompts)
        return [self.prompts[place] for _, place in chosen], [seed * places + place for seed, place in chosen]

    def to_json(self) -> dict[str, Any]:
        """Give the experiment as plain data, from which `from_json` makes it again."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("pipelines", "stacks")}
        stacks = {name: stack.to_json() for name, stack in self.stacks.items()}
        data = {"pipelines": [asdict(source) for source in self.pipelines], "stacks": stacks, **plain}
        made: dict[str, Any] = json.loads(json.dumps(data))
        return made

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Experiment:
        """Make an experiment of what `to_json` gave."""
        stacks = {name: Stack.from_json(stack) for name, stack in data["stacks"].items()}
        sizes = None if data["sizes"] is None else tuple(map(tuple, data["sizes"]))
        sources = tuple(Source(**source) for source in data["pipelines"])
        return cls(**{**data, "pipelines": sources, "stacks": stacks, "sizes": sizes})
