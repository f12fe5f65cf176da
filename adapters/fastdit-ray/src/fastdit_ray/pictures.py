"""What a replica does, without Ray: one pipeline under a stack, its engines built for the sizes that are served."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastdit import Stack, accelerate
from fastdit.errors import FastditError, InvalidConfig

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width in pixels."""


class SizeNotWarmed(FastditError):
    """A picture of a size was asked for that no engine was built for, and others are refused."""


@dataclass(frozen=True)
class Asked:
    """A picture that is asked for: its size, its prompt (None where the embeddings are in `Served.call`), its noise."""

    height: int
    width: int
    prompt: str | None = None
    seed: int = 0

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.height, self.width


@dataclass(frozen=True)
class Served:
    """What is served, as every replica is told it.

    Args:
        load: gives the pipeline on its device; called once in each replica. A function of a module, or one that
            cloudpickle can send.
        stack: what accelerates it.
        sizes: (height, width) in pixels, each of which is warm before a replica takes requests.
        others: what becomes of other sizes. "refuse" answers them with `SizeNotWarmed`; "build" makes them, and the
            first request of a size waits for its engines.
        call: arguments of every call, such as steps, guidance, or embeddings.

    Raises:
        InvalidConfig: for no size, one that is none, and for another word.

    >>> from fastdit import load_mini
    >>> Served(load_mini, Stack(), ((256, 256), (128, 256))).others
    'refuse'
    """

    load: Callable[[], Any]
    stack: Stack
    sizes: tuple[Size, ...]
    others: Literal["refuse", "build"] = "refuse"
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise InvalidConfig(f"sizes are pairs of height and width in pixels, at least one, got {self.sizes!r}")
        if self.others not in ("refuse", "build"):
            raise InvalidConfig(f'others is "refuse" or "build", got {self.others!r}')


class Pictures:
    """Makes pictures, one at a time. Opening it builds the engines of every size, or reads them from the disk.

    Raises what `accelerate` and `warmup` raise: a stack or a size that can't be served is refused here.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        pipeline = served.load()
        pipeline.set_progress_bar_config(disable=True)
        self._twin = accelerate(pipeline, served.stack)
        self._lock = threading.Lock()
        self.warm: set[Size] = set()
        for size in served.sizes:
            self._warm_up(size)
        self._built = self._builds()

    @property
    def compilations(self) -> int:
        """How many engines were asked for since the sizes were warm, whether they were compiled or found on disk."""
        return self._builds() - self._built

    def make(self, asked: Asked) -> Image:
        """Make a picture. Raises `SizeNotWarmed` where others are refused, and what the pipeline raises."""
        if asked.size not in self.warm and self.served.others == "refuse":
            known = ", ".join(f"{height} x {width}" for height, width in sorted(self.warm))
            raise SizeNotWarmed(
                f"no engine was built for {asked.height} x {asked.width} px; the sizes that are served are {known}. "
                'Ask for one of them, name it in `sizes`, or serve others by others="build", where its first picture '
                "waits"
            )
        call = {**self.served.call, "height": asked.height, "width": asked.width, "output_type": "pil"}
        if asked.prompt is not None:
            call["prompt"] = asked.prompt
        with self._lock:
            if asked.size not in self.warm:
                self._warm_up(asked.size)
            made: Image = self._twin(**call, generator=torch.Generator().manual_seed(asked.seed)).images[0]
        return made

    def _warm_up(self, size: Size) -> None:
        own = {name: value for name, value in self.served.call.items() if name != "num_inference_steps"}
        steps = self.served.call.get("num_inference_steps")
        self._twin.fastdit.warmup(*size, steps, progress=False, **own)
        self.warm.add(size)

    def _builds(self) -> int:
        workshop = self._twin.fastdit.workshop
        return 0 if workshop is None else len(workshop.builds)
