"""Time other libraries on the same weights, in one process and in turns with the rows that compete with them.

They are compilers (diffusers' compiled blocks, the whole model autotuned with CUDA graphs), caches (diffusers' own, and
cache-dit where it is installed), and fewer plain steps. Each acts on the pipeline only while its row runs.
"""

from __future__ import annotations

import typer

from gpu.others import rivals
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
        "gpu-rivals.json",
        rivals,
        minutes=minutes,
        rounds=rounds,
        models=models,
        choose=lambda row: only in row.name and row.name not in left_out,
        options=(directory, out, rehearse),
    )


if __name__ == "__main__":
    typer.run(main)
