"""A trace of requests through a deployment: what a picture takes, queue and all, and whether anything was compiled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from fastdit_ray.pictures import Asked, Size


@dataclass(frozen=True)
class Trace:
    """What requests took, in their order, in seconds from the request to the picture, and what was compiled."""

    asked: tuple[Asked, ...]
    seconds: tuple[float, ...]
    compilations: int

    def percentile(self, part: int, size: Size | None = None) -> float:
        """Give the seconds within which so many of 100 pictures are there, of all sizes or of one."""
        own = [took for asked, took in zip(self.asked, self.seconds, strict=True) if size in (None, asked.size)]
        return quantiles(own, n=100, method="inclusive")[part - 1]

    def __str__(self) -> str:
        sizes = sorted({asked.size for asked in self.asked})
        lines = [
            f"{height} x {width}: P50 {self.percentile(50, (height, width)):.3f} s, "
            f"P95 {self.percentile(95, (height, width)):.3f} s"
            for height, width in sizes
        ]
        total = f"{len(self.asked)} requests: P50 {self.percentile(50):.3f} s, P95 {self.percentile(95):.3f} s"
        return "\n".join([f"{total}; {self.compilations} compilations after the warm-up", *lines])


def trace(handle: Any, asked: Sequence[Asked], at_once: int = 1) -> Trace:
    """Send requests to the handle of an application of one replica, `at_once` of them under way at any time."""
    before = handle.compilations.remote().result()

    def timed(one: Asked) -> float:
        start = time.perf_counter()
        handle.picture.remote(one).result()
        return time.perf_counter() - start

    with ThreadPoolExecutor(at_once) as pool:
        seconds = tuple(pool.map(timed, asked))
    return Trace(tuple(asked), seconds, handle.compilations.remote().result() - before)
