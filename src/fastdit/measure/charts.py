"""The report's plot of speed against quality: where everything goes, so that labels stay readable.

The page's template draws it; positions are pixels of a frame of `WIDTH` x `HEIGHT`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastdit.measure.statistics import Interval

WIDTH, HEIGHT = 920, 470
LEFT, RIGHT, TOP, BOTTOM = 64, WIDTH - 28, 24, HEIGHT - 56

_SPEED_TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_CHARACTER, _LINE = 7.6, 15  # a bold 12 px label's mean character width and line height
_PLACES = (  # where a label may go: offset from its point, and text anchor; the first of the cheapest is taken
    (12, 4, "start"),
    (-12, 4, "end"),
    (0, -13, "middle"),
    (0, 22, "middle"),
    (10, -12, "start"),
    (10, 20, "start"),
    (-10, -12, "end"),
    (-10, 20, "end"),
    (0, -29, "middle"),
    (0, 38, "middle"),
)


@dataclass(frozen=True)
class Point:
    """One configuration: its speed-up, its quality, and whether it is a plain run, which the line connects."""

    label: str
    speed_up: Interval
    quality: Interval
    plain: bool


@dataclass(frozen=True)
class Mark:
    """A point's place, its error bars, and its label's place and anchor."""

    point: Point
    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    label: tuple[float, float, str] = (0.0, 0.0, "start")


@dataclass(frozen=True)
class Plot:
    """Everything that is drawn: ticks as (pixel, text), the corners of the line, the points."""

    speed_ticks: list[tuple[float, str]]
    quality_ticks: list[tuple[float, str]]
    line: list[tuple[float, float]]
    marks: list[Mark]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    def overlap(self, other: _Box) -> float:
        left, top = max(self.left, other.left), max(self.top, other.top)
        return _Box(left, top, min(self.right, other.right), min(self.bottom, other.bottom)).area


_FRAME = _Box(LEFT, TOP - 12, WIDTH - 4, BOTTOM)


@dataclass(frozen=True)
class _Axis:
    """Maps the values from `low` to `high` to the pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Bar:
    """A part of a waterfall: where it begins and how wide it is, in percent of the plain run, and what it says."""

    name: str
    start: float
    width: float
    told: str
    kind: str


@dataclass(frozen=True)
class Waterfall:
    """The way from the plain run's seconds to a stack's, a bar for each part."""

    name: str
    bars: tuple[Bar, ...]

    @classmethod
    def of(cls, name: str, seconds: float, gains: Sequence[tuple[str, Interval, bool]]) -> Waterfall:
        """Lay out the parts' gains, each a factor with its interval and whether the part is dead weight."""
        bars, left = [Bar("plain", 0.0, 100.0, f"{seconds:.2f} s", "plain")], 100.0
        for part, gain, dead in gains:
            after = left / gain.estimate
            told = f"{gain:.2f} times{', dead weight beside the others' if dead else ''}"
            kind = "dead" if dead else "gain" if after <= left else "loss"
            bars.append(Bar(part, min(left, after), abs(left - after), told, kind))
            left = after
        widest = max(bar.start + bar.width for bar in bars)
        every = [*bars, Bar(name, 0.0, left, f"{seconds * left / 100:.2f} s", "stack")]
        return cls(
            name, tuple(replace(bar, start=bar.start * 100 / widest, width=bar.width * 100 / widest) for bar in every)
        )


def speed_quality(points: Sequence[Point]) -> Plot:
    """Speed-up (logarithmic) against quality, with both intervals; plain runs are joined by a line."""
    fast = min(point.speed_up.low for point in points) / 1.15, max(point.speed_up.high for point in points) * 1.3
    horizontal = _Axis(math.log(fast[0]), math.log(fast[1]), LEFT, RIGHT)
    low, high = min(point.quality.low for point in points), max(point.quality.high for point in points)
    margin = 0.1 * (high - low) or 0.5
    vertical = _Axis(low - margin, high + margin, BOTTOM, TOP)
    step = _nice_step((vertical.high - vertical.low) / 5)
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [step * n for n in range(math.ceil(vertical.low / step), math.floor(vertical.high / step) + 1)]
    marks = [_mark(point, horizontal, vertical) for point in points]
    return Plot(
        [(horizontal.at(math.log(tick)), f"{tick:g}x") for tick in _SPEED_TICKS if fast[0] <= tick <= fast[1]],
        [(vertical.at(tick), f"{tick:.{digits}f}") for tick in ticks],
        sorted((mark.x, mark.y) for mark in marks if mark.point.plain),
        _labelled(marks),
    )


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)


def _mark(point: Point, horizontal: _Axis, vertical: _Axis) -> Mark:
    speed, quality = point.speed_up, point.quality
    x, left, right = (horizontal.at(math.log(value)) for value in (speed.estimate, speed.low, speed.high))
    y, low, high = (vertical.at(value) for value in (quality.estimate, quality.low, quality.high))
    return Mark(point, x, y, left, right, low, high)


def _labelled(marks: Sequence[Mark]) -> list[Mark]:
    """Put every label where it covers the least: of other labels, points, error bars, the line, the frame's outside."""
    taken = list(_obstacles(marks))

    def cost(box: _Box) -> float:
        return sum(map(box.overlap, taken)) + 10 * (box.area - box.overlap(_FRAME))

    placed = []
    for mark in sorted(marks, key=lambda mark: mark.point.plain):
        candidates = [(mark.x + dx, mark.y + dy, anchor) for dx, dy, anchor in _PLACES]
        boxes = [_label_box(mark.point.label, *candidate) for candidate in candidates]
        best = min(range(len(boxes)), key=lambda index: cost(boxes[index]))
        taken.append(boxes[best])
        placed.append(replace(mark, label=candidates[best]))
    return placed[::-1]


def _obstacles(marks: Sequence[Mark]) -> Iterator[_Box]:
    for mark in marks:
        yield _Box(mark.x - 8, mark.y - 8, mark.x + 8, mark.y + 8)
        yield _Box(mark.x - 2, mark.high, mark.x + 2, mark.low)
        yield _Box(mark.left, mark.y - 2, mark.right, mark.y + 2)
    corners = sorted((mark.x, mark.y) for mark in marks if mark.point.plain)
    for (x1, y1), (x2, y2) in itertools.pairwise(corners):
        pieces = max(1, int(abs(x2 - x1) // 6))
        for share in ((piece + 0.5) / pieces for piece in range(pieces)):
            x, y = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
            yield _Box(x - 3, y - 2, x + 3, y + 2)


def _label_box(text: str, x: float, y: float, anchor: str) -> _Box:
    width = _CHARACTER * len(text)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return _Box(left, y - _LINE + 3, left + width, y + 3)
