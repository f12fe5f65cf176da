"""Which blocks of a forward a step cache may skip: runs of blocks between the leading and the trailing ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from fastdit.blocks.observation import BlockPort, Chain, Wiring
from fastdit.errors import InvalidConfig
from fastdit.step_cache.base import StepCache


@dataclass(frozen=True)
class Segment:
    """Blocks `first` to `stop` - 1 of chain number `chain`, skipped together.

    Its part of the forward begins at place `enters`, where the stream that the gate watches is taken. `part` numbers
    the decision that it follows; `decides` says that the decision is taken here.
    """

    number: int
    chain: int
    enters: int
    first: int
    stop: int
    part: int
    decides: bool


class Cut:
    """A wiring cut into segments for one cache, with the place of every block in them: all that a forward looks up."""

    def __init__(self, wiring: Wiring, cache: StepCache) -> None:
        self.chains = wiring.chains
        self.segments = segments_of(wiring, cache)
        #: (list name, index) -> (segment, place in the chain, port); blocks that no segment skips or leads are absent.
        self.places: dict[tuple[str, int], tuple[Segment, int, BlockPort]] = {
            (port.name, port.index): (segment, place, port)
            for segment in self.segments
            for place, port in enumerate(self.chains[segment.chain].blocks)
            if segment.enters <= place < segment.stop
        }


def segments_of(wiring: Wiring, cache: StepCache) -> tuple[Segment, ...]:
    """Cut the chains from the entry on into segments. Raises `InvalidConfig` where no block is left to skip."""
    runs = [
        (number, *span) for number in range(wiring.entry, len(wiring.chains)) for span in _spans(wiring, number, cache)
    ]
    own = cache.scope == "list"
    segments = []
    for number, (chain, start, stop) in enumerate(runs):
        leads, trails = own or number == 0, own or number == len(runs) - 1
        first = start + (cache.leading_blocks if leads else 0)
        last = stop - (cache.trailing_blocks if trails else 0)
        if first >= last:
            raise InvalidConfig(
                f"{cache.describe()} leaves no block of {_names(wiring.chains[chain], start, stop)} to skip: "
                f"{cache.leading_blocks} leading and {cache.trailing_blocks} trailing ones of {stop - start} always "
                "run; ask for fewer"
            )
        segments.append(Segment(number, chain, start, first, last, number if own else 0, own or number == 0))
    return tuple(segments)


def _spans(wiring: Wiring, number: int, cache: StepCache) -> list[tuple[int, int]]:
    """Give the (start, stop) places of a chain that stand under one decision: all of it, or each block list."""
    blocks = wiring.chains[number].blocks
    if cache.scope == "stack":
        return [(0, len(blocks))]
    spans, place = [], 0
    for _, ports in groupby(blocks, key=lambda port: port.name):
        count = len(list(ports))
        spans.append((place, place + count))
        place += count
    return spans


def _names(chain: Chain, start: int, stop: int) -> str:
    return " and ".join(dict.fromkeys(port.name for port in chain.blocks[start:stop]))
