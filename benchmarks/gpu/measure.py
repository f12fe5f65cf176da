"""Time stacks against the plain pipeline at full size: stages, engines and masks together, batches of 1 and 4.

What is skipped is imposed, by a mask with the share of steps that TeaCache is published to compute: on random weights a
gate would skip all that it may. Rows that should give the plain run's picture are compared with it, and whatever fails,
gives another picture or none, or finds no time left, is a row that says so.
"""

from __future__ import annotations

import typer

from gpu.rows import Cells
from gpu.session import Directory, Minutes, Models, Only, Out, Rehearse, Rounds, Skip, session


def main(
    minutes: Minutes = 9.0,
    rounds: Rounds = 5,
    models: Models = "flux-dev",
    only: Only = "",
    skip: Skip = None,
    directory: Directory = None,
    out: Out = None,
    rehearse: Rehearse = False,
) -> None:
    """Measure what is installed; exit 3 without a CUDA device, 1 without a plain run, 2 with a lost device."""
    left_out = skip or []
    session(
        "gpu.json",
        Cells.claims,
        minutes=minutes,
        rounds=rounds,
        models=models,
        choose=lambda row: only in row.name and row.name not in left_out,
        options=(directory, out, rehearse),
    )


if __name__ == "__main__":
    typer.run(main)
