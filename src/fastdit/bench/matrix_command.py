"""`fastdit matrix PIPE`: what goes together on a pipeline, as Markdown, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdit.bench.command import pixels
from fastdit.errors import InvalidConfig

if TYPE_CHECKING:
    from fastdit.bench.matrix import Matrix
    from fastdit.measure.timing import Progress


def is_pipeline(name: str) -> bool:
    """Whether a name is one of a pipeline that can be loaded, and not a part of its class's."""
    from fastdit.bench.source import Source

    try:
        Source(name)
    except InvalidConfig:
        return False
    return True


def compatibility(
    pipe: str, parts: Sequence[str], levels: Sequence[str], asked: tuple[Any, ...], progress: Progress
) -> Matrix:
    """Run the matrix and write its three forms. Raises `InvalidConfig` for parts and levels that are none."""
    from fastdit.accelerator import Level
    from fastdit.bench.cluster import workers_at
    from fastdit.bench.grammar import parse_stack
    from fastdit.bench.matrix import MatrixRun, parts_for
    from fastdit.bench.source import Source

    triples, size, steps, rounds, prompt, out, ray = asked
    known = {one.value: one for one in Level}
    if unknown := [name for name in levels if name not in known]:
        raise InvalidConfig(f"the levels are {', '.join(known)}, got {unknown[0]!r}")
    given = [part for text in parts for part in parse_stack(text)]
    source = Source(pipe)
    with workers_at(ray) as workers:
        pipeline = source.load()
        chosen = given or list(parts_for(pipeline, [known[name] for name in levels] or list(Level)))
        if len(chosen) < 2:
            raise InvalidConfig(f"a matrix needs at least two accelerators, got {len(chosen)}")
        call: dict[str, Any] = {"prompt": prompt, "num_inference_steps": steps}
        if size is not None:
            call |= dict(zip(("height", "width"), pixels(size), strict=True))
        run = MatrixRun(pipeline, call, Path(out), rounds=rounds, name=pipe)
        made = run.run(chosen, 3 if triples else 2, progress, workers)
    (Path(out) / "matrix.md").write_text(made.markdown(), encoding="utf-8")
    (Path(out) / "matrix.json").write_text(json.dumps(made.to_json(), indent=1) + "\n", encoding="utf-8")
    (Path(out) / "matrix.html").write_text(made.html(), encoding="utf-8")
    return made
