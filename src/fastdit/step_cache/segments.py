"""Which blocks of a forward a step cache may skip: runs of blocks between the leading and the trailing ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from fastdit.accelerator import Need
from fastdit.blocks.ports import BlockPort, Strand, Wiring
from fastdit.errors import InvalidConfig, UnsupportedModel

if TYPE_CHECKING:
    from fastdit.step_cache.base import StepCache


@dataclass(frozen=True)
class Segment:
    """Blocks `first` to `stop` - 1 of strand number `strand`, skipped together.

    Its part of the forward begins at place `enters`, where the stream that the gate watches is taken. `part` numbers
    the decision that it follows; `decides` says that the decision is taken here.
    """

    number: int
    strand: int
    enters: int
    first: int
    stop: int
    part: int
    decides: bool


class Cut:
    """A wiring cut into segments for one cache, with the place of every block in them: all that a forward looks up."""

    def __init__(self, wiring: Wiring, cache: StepCache) -> None:
        if wiring.token_axis != 1:
            _refuse_sequence_first(cache)
        self.strands, self.token_axis = wiring.strands, wiring.token_axis
        self.segments = segments_of(wiring, cache)
        #: What is skipped: a strand's number, the first place, and the one behind the last.
        self.spans = [(one.strand, one.first, one.stop) for one in self.segments]
        #: Whether a segment is the last one of its part.
        self.ends_part = [
            not any(other.part == one.part and other.number > one.number for other in self.segments)
            for one in self.segments
        ]
        #: (list name, index) -> (segment, place in the strand, port); blocks that no segment skips or leads are absent.
        self.places: dict[tuple[str, int], tuple[Segment, int, BlockPort]] = {
            (port.name, port.index): (segment, place, port)
            for segment in self.segments
            for place, port in enumerate(self.strands[segment.strand].blocks)
            if segment.enters <= place < segment.stop
        }


def _refuse_sequence_first(cache: StepCache) -> None:
    """Raise `UnsupportedModel` where a cache takes the first axis of the streams for that of the samples."""
    why = None
    if Need.TOKEN_GRID in cache.effects.needs:
        why = "lays tokens out as a picture"
    elif cache.per_image:
        why = "decides for each image of a batch"
    elif cache.stage_change == "carry":
        why = "carries its history from token to token"
    if why is not None:
        raise UnsupportedModel(
            f"{cache.describe()} {why} and reads streams as [batch, tokens, width], and the blocks of this model take "
            "[tokens, batch, width]; use a cache that takes streams as a whole, such as FirstBlockCache()"
        )


def segments_of(wiring: Wiring, cache: StepCache) -> tuple[Segment, ...]:
    """Cut the strands from the entry on into segments. Raises `InvalidConfig` where no block is left to skip."""
    runs = [
        (number, *span) for number in range(wiring.entry, len(wiring.strands)) for span in _spans(wiring, number, cache)
    ]
    own = cache.scope == "list"
    segments = []
    for number, (strand, start, stop) in enumerate(runs):
        leads, trails = own or number == 0, own or number == len(runs) - 1
        first = start + (cache.leading_blocks if leads else 0)
        last = stop - (cache.trailing_blocks if trails else 0)
        if first >= last:
            raise InvalidConfig(
                f"{cache.describe()} leaves no block of {_names(wiring.strands[strand], start, stop)} to skip: "
                f"{cache.leading_blocks} leading and {cache.trailing_blocks} trailing ones of {stop - start} always "
                "run; ask for fewer"
            )
        segments.append(Segment(number, strand, start, first, last, number if own else 0, own or number == 0))
    return tuple(segments)


def _spans(wiring: Wiring, number: int, cache: StepCache) -> list[tuple[int, int]]:
    """Give the (start, stop) places of a strand that stand under one decision: all of it, or each block list."""
    blocks = wiring.strands[number].blocks
    if cache.scope == "stack":
        return [(0, len(blocks))]
    spans, place = [], 0
    for _, ports in groupby(blocks, key=lambda port: port.name):
        count = len(list(ports))
        spans.append((place, place + count))
        place += count
    return spans


def _names(strand: Strand, start: int, stop: int) -> str:
    return " and ".join(dict.fromkeys(port.name for port in strand.blocks[start:stop]))
