"""The report's speed/quality plot as SVG, and its label placement; colours come from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fastdit.measure.statistics import Interval

WIDTH, HEIGHT = 920, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 24, 56
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
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)


def speed_quality(points: Sequence[Point], *, quality: str) -> str:
    """Speed-up (logarithmic) against quality, with both intervals; plain runs joined by a line."""
    horizontal = _speed_axis(points)
    vertical = _quality_axis(points)
    parts = [_grid(horizontal, vertical, quality)]
    line = sorted((point for point in points if point.plain), key=lambda point: point.speed_up.estimate)
    path = " ".join(f"{horizontal.at(p.speed_up.estimate):.1f},{vertical.at(p.quality.estimate):.1f}" for p in line)
    parts.append(f'<polyline class="plain-line" points="{path}"/>')
    parts += [_mark(point, horizontal, vertical) for point in sorted(points, key=lambda point: not point.plain)]
    parts += _labels(points, horizontal, vertical)
    label = escape(f"Speed-up against {quality} of {len(points)} configurations")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, after a logarithm where `logarithmic`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, here = (self._scaled(number) for number in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def _speed_axis(points: Sequence[Point]) -> _Axis:
    low = min(point.speed_up.low for point in points) / 1.15
    high = max(point.speed_up.high for point in points) * 1.3
    ticks = tuple(tick for tick in _SPEED_TICKS if low <= tick <= high)
    return _Axis(low, high, _LEFT, WIDTH - _RIGHT, ticks, logarithmic=True)


def _quality_axis(points: Sequence[Point]) -> _Axis:
    low, high = min(point.quality.low for point in points), max(point.quality.high for point in points)
    margin = 0.1 * (high - low) or 0.5
    low, high = low - margin, high + margin
    step = _nice_step((high - low) / 5)
    ticks = tuple(step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1))
    return _Axis(low, high, HEIGHT - _BOTTOM, _TOP, ticks)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)


def _grid(horizontal: _Axis, vertical: _Axis, quality: str) -> str:
    parts = []
    digits = max(0, -math.floor(math.log10(vertical.ticks[1] - vertical.ticks[0]))) if len(vertical.ticks) > 1 else 2
    for tick in vertical.ticks:
        y = vertical.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    bottom = HEIGHT - _BOTTOM
    for tick in horizontal.ticks:
        x = horizontal.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}x</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis-name" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">speed-up →</text>')
    turned = f'transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text class="axis-name" {turned} text-anchor="middle">{escape(quality)} →</text>')
    return "".join(parts)


def _mark(point: Point, horizontal: _Axis, vertical: _Axis) -> str:
    x, y = horizontal.at(point.speed_up.estimate), vertical.at(point.quality.estimate)
    left, right = horizontal.at(point.speed_up.low), horizontal.at(point.speed_up.high)
    low, high = vertical.at(point.quality.low), vertical.at(point.quality.high)
    title = escape(f"{point.label}: {point.speed_up:.2f} times faster, {point.quality:.3f}")
    return (
        f'<g class="{"plain" if point.plain else "fast"}"><title>{title}</title>'
        f'<path class="error" d="M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {low:.1f}V{high:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if point.plain else 6.5}"/></g>'
    )


def _labels(points: Sequence[Point], horizontal: _Axis, vertical: _Axis) -> list[str]:
    """Put every label where it covers the least: of other labels, of points, of error bars, of the frame's outside."""
    taken = [box for point in points for box in _obstacles(point, horizontal, vertical)]
    taken += _line_obstacles(points, horizontal, vertical)
    parts = []
    for point in sorted(points, key=lambda point: point.plain):
        x, y = horizontal.at(point.speed_up.estimate), vertical.at(point.quality.estimate)
        candidates = [(_label_box(point.label, x + dx, y + dy, anchor), dx, dy, anchor) for dx, dy, anchor in _PLACES]
        box, dx, dy, anchor = min(candidates, key=lambda candidate: _cost(candidate[0], taken))
        taken.append(box)
        kind = "plain" if point.plain else "fast"
        parts.append(
            f'<text class="label {kind}" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">'
            f"{escape(point.label)}</text>"
        )
    return parts


def _obstacles(point: Point, horizontal: _Axis, vertical: _Axis) -> Iterable[_Box]:
    x, y = horizontal.at(point.speed_up.estimate), vertical.at(point.quality.estimate)
    yield _Box(x - 8, y - 8, x + 8, y + 8)
    yield _Box(x - 2, vertical.at(point.quality.high), x + 2, vertical.at(point.quality.low))
    yield _Box(horizontal.at(point.speed_up.low), y - 2, horizontal.at(point.speed_up.high), y + 2)


def _line_obstacles(points: Sequence[Point], horizontal: _Axis, vertical: _Axis) -> Iterable[_Box]:
    """Small boxes along the line that joins the plain runs."""
    line = sorted((point for point in points if point.plain), key=lambda point: point.speed_up.estimate)
    corners = [(horizontal.at(point.speed_up.estimate), vertical.at(point.quality.estimate)) for point in line]
    for (x1, y1), (x2, y2) in itertools.pairwise(corners):
        pieces = max(1, int(abs(x2 - x1) // 6))
        for piece in range(pieces):
            share = (piece + 0.5) / pieces
            x, y = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
            yield _Box(x - 3, y - 2, x + 3, y + 2)


def _label_box(text: str, x: float, y: float, anchor: str) -> _Box:
    width = _CHARACTER * len(text)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return _Box(left, y - _LINE + 3, left + width, y + 3)


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    area = (box.right - box.left) * (box.bottom - box.top)
    inside = box.overlap(_Box(_LEFT, _TOP - 12, WIDTH - 4, HEIGHT - _BOTTOM))
    return sum(box.overlap(other) for other in taken) + 10 * (area - inside)
