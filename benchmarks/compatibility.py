"""What goes together: pairs of all levels on the embedded pipelines, and every combination on a tiny FLUX.

`matrix` runs what `fastdit matrix` does, with what each pair gains; `combinations` runs every schedule, step cache,
forecaster, option and token cache. Both write the table of the docs, from what the other left.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

import combinations as every
from combinations import Combination, Names, tried
from fastdit.bench.matrix import Matrix, MatrixRun, parts_for
from fastdit.bench.source import Source
from fastdit.step_cache.gates.step_mask import StepMask
from saving import save

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/compatibility.md")
PIPELINES = {"mini": "FLUX", "mini:sd3": "SD3"}

#: What every cell makes: eight steps, but for stacks whose schedule has its own.
CALL = {"prompt": "a cat", "num_inference_steps": 8}

_HEAD = """# What goes together

No cell is written by hand: every one was run, and a test runs some of them again and wants the same. Gains are of few
rounds of small models, on a machine that ran both pipelines' at once: parts that change nothing seem to gain or lose
there, too. Take from the tables what works and what acts, and measure gains on your own pipeline.
"""

_EVERY = """## Every combination of methods that change features

Written by `benchmarks/compatibility.py`, which runs every stack of the table with two images on a tiny FLUX: the result
is finite, a second call gives the same bits, and the record counts the block calls that were made; or the stack is
refused by name. A cell says how many combinations of forecaster (Reuse, Taylor, PublishedTaylor, FoCa, DMD) and option
(one decision for the batch, one an image, histories carried over a switch) ran, of how many.
"""

app = typer.Typer(no_args_is_help=True)


@app.command()
def matrix(
    folder: Annotated[Path, typer.Option(help="Cells that are done; the same again goes on.")] = Path("fastdit-matrix"),
    rounds: Annotated[int, typer.Option(help="In turns with the plain pipeline.")] = 3,
    only: Annotated[str, typer.Option(help="One of the pipelines: mini, or mini:sd3.")] = "",
) -> None:
    """Run pairs of everything that can act here on the embedded pipelines."""
    for name in (name for name in PIPELINES if only in ("", name)):
        pipeline = Source(name).load()
        # A mask is of as many steps as a run, and an example's of two. What scripts register is no part of this.
        given = [part for part in parts_for(pipeline) if type(part) is not StepMask]
        parts = [part for part in given if type(part).__module__.startswith("fastdit")]
        run = MatrixRun(pipeline, CALL, folder / name.replace(":", "-"), rounds=rounds, name=name)
        made = run.run([*parts, StepMask((True, False) * 4)], progress=_say)
        save(results_of(name), made.to_json())
    if all(results_of(name).exists() for name in PIPELINES):
        write()


@app.command()
def combinations() -> None:
    """Run every combination of schedule, step cache, forecaster, option and token cache."""
    found = []
    for names in every.combinations():
        found.append(tried(names))
        if len(found) % 50 == 0:
            print(f"{len(found)} combinations tried", flush=True)
    save(RESULTS / "compatibility.json", {"combinations": found})
    write()
    print(f"{len(found)} combinations, {sum(one.refusal is not None for one in found)} refused; written to {PAGE}")


@app.command()
def write() -> None:
    """Write the page from the results."""
    PAGE.write_text(page(), encoding="utf-8")


def results_of(name: str) -> Path:
    """Give the file of an embedded pipeline's pairs."""
    return RESULTS / f"matrix-{name.replace(':', '-')}.json"


def page() -> str:
    """Give the page as the results have it."""
    parts = [_HEAD]
    for name, model in PIPELINES.items():
        text = Matrix.from_json(json.loads(results_of(name).read_text(encoding="utf-8"))).markdown()
        own = re.sub("^#", "##", text, flags=re.MULTILINE)
        parts.append(own.replace(f"What goes together on {name}", f"Pairs on the embedded {model} pipeline"))
    data = json.loads((RESULTS / "compatibility.json").read_text(encoding="utf-8"))["combinations"]
    return "\n".join([*parts, _EVERY, _table([Combination(**{**one, "names": Names(*one["names"])}) for one in data])])


def _say(_: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        print(f"{done} of {total} cells", flush=True)


def _table(found: list[Combination]) -> str:
    """Write the table, and every reason for a refusal once."""
    tokens = list(dict.fromkeys(one.names.token_cache for one in found))
    cells: dict[tuple[str, str], dict[str, list[Combination]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        cells[one.names.schedule, one.names.step_cache][one.names.token_cache].append(one)
    lines = []
    lines.append("| schedule | step cache | " + " | ".join(f"token cache: {name}" for name in tokens) + " |")
    lines.append("|---|---|" + "---|" * len(tokens))
    for (schedule, step_cache), row in cells.items():
        shown = []
        for name in tokens:
            ran = sum(one.refusal is None for one in row[name])
            shown.append("refused" if not ran else "runs" if len(row[name]) == 1 else f"{ran} of {len(row[name])}")
        lines.append(f"| {schedule} | {step_cache} | " + " | ".join(shown) + " |")
    reasons: dict[str, list[Combination]] = defaultdict(list)
    for one in found:
        if one.refusal is not None:
            reasons[_gist(one.refusal)].append(one)
    lines.append("\n### Why stacks are refused\n")
    for gist, ones in reasons.items():
        caches = ", ".join(dict.fromkeys(one.names.step_cache for one in ones))
        lines.append(f"* **{len(ones)}** stacks ({caches}): {gist}. For example: {ones[0].refusal}")
    return "\n".join(lines) + "\n"


def _gist(refusal: str) -> str:
    """Say what need and change a refusal is about, without the configurations."""
    needs, _, changes = refusal.partition(" needs ")[2].partition(", and ")
    return f"one needs {needs}, the other changes {changes.partition(' changes ')[2].partition(';')[0]}"


if __name__ == "__main__":
    app()
