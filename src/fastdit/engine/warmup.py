"""What a warm-up built, and the bar that shows it while it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastdit.engine.workshop import Build


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
        lines = [f"{len(self.builds)} engines in {self.seconds:.1f} s"]
        for build in self.builds:
            stage = (
                ""
                if build.stage is None
                else f", {build.stage[2]} tokens of a {build.stage[0]} x {build.stage[1]} grid"
            )
            how = "kept" if build.kept else "built"
            fate = f"runs eagerly: {build.failure}" if build.failure is not None else f"{how} in {build.seconds:.1f} s"
            lines.append(f"  {build.piece} {build.shape}{stage}: {fate}")
        return "\n".join(lines)


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
