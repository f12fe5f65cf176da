"""What pictures are worth: fidelity to the plain pipeline's full run of the same seeds, and, apart from it, quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdit.bench.experiment import Group, Row
from fastdit.bench.store import Cell, Store
from fastdit.measure.results import Metric
from fastdit.measure.statistics import mean
from fastdit.mini.language import judge_of, language_of

if TYPE_CHECKING:
    from PIL.Image import Image

Made = tuple[Row, list[Cell]]
"""A row and its finished cells."""


def fidelity(store: Store, group: Group, plain: Made, own: Made, networks: Sequence[str] = ()) -> dict[str, Metric]:
    """Give PSNR (dB) and SSIM to the plain run's pictures, over the rounds whose pictures both have.

    `networks` are such as `fastdit.measure.likeness` opens, which raises `MissingWeights`.
    """
    from fastdit.measure.images import psnr, ssim
    from fastdit.measure.likeness import Wanted, opened

    pairs = list(zip(_pictures(store, group, *plain), _pictures(store, group, *own), strict=False))
    if not pairs:
        return {}
    references, images = ([image for _, image in side] for side in zip(*pairs, strict=True))
    seen = {Wanted.parsed(text).name: opened(text)(images, references) for text in networks}
    return _metrics({"psnr": psnr(images, references), "ssim": ssim(images, references), **seen})


def fidelity_by(networks: Sequence[str]) -> dict[str, str]:
    """Name what likeness to the full run is measured by, with versions, each under the name of its metric."""
    from importlib.metadata import version

    from fastdit.measure.likeness import Wanted, opened

    own = f"torchmetrics {version('torchmetrics')}"
    return {"psnr": own, "ssim": own} | {Wanted.parsed(text).name: opened(text).said for text in networks}


def quality(store: Store, group: Group, own: Made) -> dict[str, Metric]:
    """Give the pictures' sharpness, and where an embedded pipeline's judge can read the prompts its scores, 0 to 1."""
    from fastdit.measure.images import sharpness

    pictures = _pictures(store, group, *own)
    if not pictures:
        return {}
    samples = {"sharpness": sharpness([image for _, image in pictures])}
    if (architecture := group.source.architecture) is None:
        return _metrics(samples)
    prompts = [prompt for prompt, _ in pictures]
    try:
        for prompt in prompts:
            language_of(architecture).parse(prompt)
    except ValueError:
        return _metrics(samples)
    judge = judge_of(architecture, "tables")
    if judge is None:
        return _metrics(samples)
    return _metrics({**samples, "judge": judge.score([image for _, image in pictures], prompts).tolist()})


def _pictures(store: Store, group: Group, row: Row, cells: list[Cell]) -> list[tuple[str, Image]]:
    """Open the kept pictures of a row with their prompts, in the order of rounds."""
    from PIL import Image

    return [
        (prompt, Image.open(store.picture(group, row, name)).convert("RGB"))
        for cell in cells
        for prompt, name in zip(cell.prompts, cell.pictures, strict=False)
    ]


def _metrics(samples: dict[str, list[float]]) -> dict[str, Metric]:
    return {name: Metric(mean(values), tuple(values)) for name, values in samples.items()}
