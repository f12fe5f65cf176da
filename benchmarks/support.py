"""Try schedule, step cache and token cache on every pipeline of the installed diffusers; write the docs' table."""

from __future__ import annotations

from pathlib import Path

import diffusers
import typer

from fastdit.measure.support import pipeline_classes, supported, table
from saving import save

_HEAD = """# What works with which pipeline

Written by `benchmarks/support.py`, as `fastdit matrix` prints it: all {count} pipelines with a transformer of diffusers
{version}. "Yes" is what came of running that very pipeline, tiny and with random weights: under schedules, and under
caches (FirstBlockCache for the step caches, ToCa for the token caches), which skipped what they were to skip and were
bit-equal to the plain pipeline where neutral. "No" with an error is what that pipeline refused, or its transformer by
itself where there is no tiny pipeline of the class here; what such a transformer takes is a remark to "not run".

Mixed-resolution stages work with {mixed} of these pipelines, stages of whole frames (those of ProgressiveResolution)
with {whole}; a video's frames are made smaller plane by plane. Image-to-image starts at the stage that the strength
reaches, masks follow the stages, and the tokens of pictures that an editing pipeline appends stay in place. Where a
reason ends in "undescribed", nothing is known to be in the way but the description. `EasyCache` and the like, which
skip whole forwards, need no blocks, so they also work where the step caches here say no.
"""


def main(out: Path = Path("benchmarks/results/support.json"), page: Path = Path("docs/support.md")) -> None:
    """Try every pipeline class, save what came of it, and write the page."""
    rows = [supported(pipeline) for pipeline in pipeline_classes()]
    mixed, whole = (sum(bool(getattr(row, level).works) for row in rows) for level in ("mixed", "whole"))
    save(out, {"pipelines": rows})
    head = _HEAD.format(count=len(rows), version=diffusers.__version__, mixed=mixed, whole=whole)
    page.write_text(f"{head}\n{table(rows)}", encoding="utf-8")
    print(f"{len(rows)} pipelines, mixed stages with {mixed}, whole frames with {whole}; written to {page}")


if __name__ == "__main__":
    typer.run(main)
