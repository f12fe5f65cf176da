"""Run every combination of schedule, step cache, forecaster, option and token cache; write the table of the docs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import typer

from combinations import Combination, combinations, tried
from saving import save

_HEAD = """# What goes together

Written by `benchmarks/compatibility.py`, which runs every stack of the table with two images on a tiny FLUX: the result
is finite, a second call gives the same bits, and the record counts the block calls that were made; or the stack is
refused by name. A cell says how many combinations of forecaster (Reuse, Taylor, PublishedTaylor, FoCa, DMD) and option
(one decision for the batch, one an image, histories carried over a switch) ran, of how many.
"""


def main(out: Path = Path("benchmarks/results/compatibility.json"), page: Path = Path("docs/compatibility.md")) -> None:
    """Run the combinations, save what came of each, and write the page."""
    found = []
    for names in combinations():
        found.append(tried(names))
        if len(found) % 50 == 0:
            print(f"{len(found)} combinations tried", flush=True)
    save(out, {"combinations": found})
    page.write_text(_page(found), encoding="utf-8")
    print(f"{len(found)} combinations, {sum(one.refusal is not None for one in found)} refused; written to {page}")


def _page(found: list[Combination]) -> str:
    """Write the table, and every reason for a refusal once."""
    tokens = list(dict.fromkeys(one.names.token_cache for one in found))
    cells: dict[tuple[str, str], dict[str, list[Combination]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        cells[one.names.schedule, one.names.step_cache][one.names.token_cache].append(one)
    lines = [_HEAD]
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
    lines.append("\n## Why stacks are refused\n")
    for gist, ones in reasons.items():
        caches = ", ".join(dict.fromkeys(one.names.step_cache for one in ones))
        lines.append(f"* **{len(ones)}** stacks ({caches}): {gist}. For example: {ones[0].refusal}")
    return "\n".join(lines) + "\n"


def _gist(refusal: str) -> str:
    """Say what need and change a refusal is about, without the configurations."""
    needs, _, changes = refusal.partition(" needs ")[2].partition(", and ")
    return f"one needs {needs}, the other changes {changes.partition(' changes ')[2].partition(';')[0]}"


if __name__ == "__main__":
    typer.run(main)
