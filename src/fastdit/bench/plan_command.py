"""`fastdit plan`: what a stack will do on a pipeline and what that will cost, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdit.bench.command import pixels
from fastdit.errors import InvalidConfig

if TYPE_CHECKING:
    from fastdit.stack import Stack

#: What is planned where nothing is named.
DEFAULT = "ProgressiveResolution 4x, TeaCache"


def plan(
    pipe: Annotated[
        str,
        typer.Argument(help="mini, mini:sd3, a folder, a hub's name; a saved stack's folder plans it for mini."),
    ] = "mini",
    stack: Annotated[str | None, typer.Option(help="A stack as text, or the folder of a saved one.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 512, or 512x768 for height x width.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; the schedule's own if left out.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    prompt: Annotated[str, typer.Option(help="What is measured with.")] = "a cat",
    measure: Annotated[
        bool, typer.Option(help="Measure the pipeline's costs on this machine, and what the stack does; a minute.")
    ] = False,
    machine: Annotated[
        str | None, typer.Option(help="h100 or so: predict a published model, such as flux-dev, without its machine.")
    ] = None,
) -> None:
    """Print what a stack would do in a call and, where costs are known, the seconds, FLOPs and memory it will take.

    `--measure` takes the pipeline's costs once; they are kept for this machine and model, for every later plan.
    """
    if (Path(pipe) / "stack.json").is_file():
        pipe, stack = "mini", stack or pipe
    chosen = _stack(stack)
    shape = pixels(size) if size is not None else None
    if shape is not None and (height is not None or width is not None):
        raise InvalidConfig("give --size, or --height and --width, and not both")
    tall, wide = shape or (height, width)
    if machine is not None:
        from fastdit.predict.roofline import predict_on

        given = None if tall is None or wide is None else (tall, wide)
        found = predict_on(pipe, machine, chosen, given, steps)
        typer.echo("\n".join([str(found.plan), *found.lines()]))
        return
    from fastdit.bench.source import Source

    pipeline = Source(pipe).load()
    if measure:
        _measure(pipeline, chosen, {"prompt": prompt}, steps)
    typer.echo(_explained(pipe, pipeline, chosen, (tall, wide, steps), batch))


def _stack(text: str | None) -> Stack:
    from fastdit.bench.grammar import parse_stack
    from fastdit.stack import Stack

    if text is not None and (Path(text) / "stack.json").is_file():
        return Stack.from_pretrained(text)
    return parse_stack(DEFAULT if text is None else text)


def _measure(pipeline: Any, stack: Stack, call: dict[str, Any], steps: int | None) -> None:
    """Measure the costs, and what the stack decides as it runs; keep them."""
    from dataclasses import replace

    from fastdit.bench.cost import CostMeter, probed
    from fastdit.predict.cost import keep_model, kept_model

    meter, before = CostMeter(pipeline, call), kept_model(pipeline)
    if stack.engine is not None:
        meter.add_engine(stack.engine)
    model = meter.rounds()
    if before is not None:
        model = replace(model, probes={**before.probes, **model.probes}, engines={**before.engines, **model.engines})
    if stack.step_cache is not None or stack.token_cache is not None:
        model = probed(meter, model, stack, steps)
    path = keep_model(pipeline, model)
    typer.echo(f"costs kept in {path}; they fit what was measured to {model.error:.1%}", err=True)
    if model.warning is not None:
        typer.echo(model.warning, err=True)


def _explained(
    name: str, pipeline: Any, stack: Stack, asked: tuple[int | None, int | None, int | None], batch: int
) -> str:
    from fastdit.acceleration import accelerate
    from fastdit.predict.cost import kept_model
    from fastdit.predict.estimate import predict

    made = accelerate(pipeline, stack).fastdit.plan(*asked)
    if (model := kept_model(pipeline)) is None:
        return f"{made}\n  costs are not known here: fastdit plan {name} --measure takes them in a minute, once"
    if batch == 1:
        return str(made)
    return "\n".join([str(made), *predict(model, pipeline, made, batch=batch).lines(), f"(for {batch} images a call)"])
