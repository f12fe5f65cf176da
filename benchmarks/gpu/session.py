"""What the scripts share: their options, and a whole session of one or more models within so many minutes."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastdit.errors import FastditWarning
from gpu.bench import Bench, DeviceLost, measure, release
from gpu.results import Results, beside_published, table
from gpu.rows import Cells, Row
from published import MODELS

NO_GPU, LOST = 3, 2

#: The parts of the time that the models share.
SHARES = {"flux-dev": 3.0, "sd3-medium": 1.0}

Minutes = Annotated[float, typer.Option(help="For everything; what finds no time left says so in its row.")]
Rounds = Annotated[int, typer.Option(help="At most; as many as there is time for.")]
Models = Annotated[str, typer.Option(help=f"Names with commas between, of {', '.join(MODELS)}.")]
Only = Annotated[str, typer.Option(help="Only rows whose name has this in it, and the plain runs.")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave out the row of this name; may be given several times.")]
Directory = Annotated[Path | None, typer.Option(help="Where engines are kept; a new folder if left out.")]
Rehearse = Annotated[
    bool, typer.Option(help="Tiny models on the CPU: the script is tried out, its times mean nothing.")
]
Out = Annotated[Path | None, typer.Option(help="Joined with what the file holds already; see README.md.")]


def say(text: str) -> None:
    """Print at once, since a session may be cut off."""
    print(text, flush=True)


def place(name: str, out: Path | None, *, rehearse: bool) -> tuple[str, Path]:
    """Give the device and the file of results. Exits with 3 where there is no CUDA device and none is pretended."""
    if not rehearse and not torch.cuda.is_available():
        say("There is no CUDA device here, and this benchmark is for one; --rehearse tries the script itself out.")
        raise typer.Exit(NO_GPU)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-")) if rehearse else Path(__file__).parents[1] / "results"
    return "cpu" if rehearse else "cuda", out or folder / name


def session(
    file: str,
    rows: Callable[[Cells], list[Row]],
    *,
    minutes: float,
    rounds: int,
    models: str,
    choose: Callable[[Row], bool],
    options: tuple[Path | None, Path | None, bool],
) -> None:
    """Measure rows of some models; exit 1 where a plain run failed, 2 where the device was lost amid the rows.

    `options` are where engines are kept, the file of results, and whether it is a rehearsal.
    """
    directory, out, rehearse = options
    device, path = place(file, out, rehearse=rehearse)
    warnings.simplefilter("ignore", FastditWarning)
    end, names = time.monotonic() + 60.0 * minutes, [name.strip() for name in models.split(",")]
    kept = str(directory or tempfile.mkdtemp(prefix="engines-"))
    dtype = torch.bfloat16
    results = Results(path, device=device, dtype=dtype, rehearsal=rehearse)
    say(f"results go to {path}, engines to {kept}")
    failed = 0
    for index, name in enumerate(names):
        model = MODELS[name].smallest() if rehearse else MODELS[name]
        chosen = [row for row in rows(Cells(model, kept)) if row.plain or choose(row)]
        now = time.monotonic()
        share = SHARES[name] / sum(SHARES[later] for later in names[index:])
        bench = Bench(model, device, dtype, now + (end - now) * share)
        say(f"{name}: built in {time.monotonic() - now:.1f} s")
        into = results.add(name, model, sum(part.numel() for part in bench.pipeline.transformer.parameters()))

        def keep(name: str = name, chosen: list[Row] = chosen, into: list[dict[str, Any]] = into) -> None:
            results.keep(name, chosen, into)

        try:
            measure(bench, chosen, rounds=rounds, keep=keep, say=say)
        except DeviceLost as lost:
            keep()
            say(str(lost))
            failed = LOST
        known = results.data["models"][name]
        Console(width=None if Console().is_terminal else 160).print(table(f"{name}, {model.pixels} px", known))
        say(beside_published(known))
        for row in chosen:
            row.pipeline = None  # one model at a time
            if row.error is not None:
                say(f"  {row.name}: {row.error}")
        failed = failed or int(chosen[0].error is not None)
        if failed == LOST:
            break
        del bench, chosen
        release(torch.device(device))
    raise typer.Exit(failed)
