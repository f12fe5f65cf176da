"""What it took to get engines: one, all those of a warm-up, and the bar that shows it while it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Build:
    """What it took to get one engine: `kept` says that it was found on disk; `failure`, that there is none, and why."""

    piece: str
    shape: str
    stage: tuple[Hashable, ...] | None
    seconds: float
    kept: bool = False
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.piece} {self.shape} runs eagerly: {self.failure}"
        where = ""
        if self.stage is not None:
            rows, columns, kind, *_ = self.stage
            where = f", {kind} tokens of a {rows} x {columns} grid"
        return f"{self.piece} {self.shape}{where}: {'kept' if self.kept else 'built'} in {self.seconds:.1f} s"


@dataclass(frozen=True)
class WarmUp:
    """Every engine that a warm-up built or found on disk, in order, and how long it all took. Prints as a table."""

    builds: tuple[Build, ...]
    seconds: float

    @property
    def seconds_by_shape(self) -> dict[str, float]:
        """Seconds spent on the engines of each shape (that of the largest tensor which enters a piece)."""
        sums: dict[str, float] = defaultdict(float)
        for build in self.builds:
            sums[build.shape] += build.seconds
        return dict(sums)

    def __str__(self) -> str:
        return "\n  ".join([f"{len(self.builds)} engines in {self.seconds:.1f} s", *map(str, self.builds)])


@contextmanager
def progress_bar(expected: int, *, shown: bool) -> Iterator[Callable[[Build], None]]:
    """Show a bar of `expected` engines, on stderr, that moves on with each `Build`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("building engines", total=expected)
        done = 0

        def show(build: Build) -> None:
            nonlocal done
            done += 1
            text = f"{build.piece} {build.shape}, {build.seconds:.1f} s"
            progress.update(task, completed=done, total=max(expected, done), description=text)

        yield show
        progress.update(task, completed=done, total=done)
