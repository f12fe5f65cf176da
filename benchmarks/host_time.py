"""Host time of a forward of FLUX's 57 blocks where there is next to nothing to compute: what a launch costs, on a CPU.

Blocks are so small that a forward is Python, dispatch and calls of compiled code, as the host's part is on a GPU.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from torch import nn

from fastdit.acceleration import accelerate
from fastdit.engine.aot import AOT
from fastdit.engine.compile import Compile
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import median_of_ratios
from fastdit.measure.timing import time_interleaved
from fastdit.testing import seed_weights
from saving import save

RIVAL = "compile_repeated_blocks"
BAR = 1.05
DOUBLE, SINGLE, HEADS, HEAD_WIDTH, TOKENS, TEXT = 19, 38, 2, 32, 16, 8

Forward = Callable[[int], torch.Tensor]


def flux() -> nn.Module:
    """FLUX's transformer with all of its blocks, each 64 wide."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    seed_weights(model, 0)
    return model


def arguments() -> dict[str, torch.Tensor]:
    """A forward's arguments: 16 tokens of a picture and 8 of text."""
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(1, TOKENS, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.randn(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def forwards(folder: Path, opened: ExitStack) -> dict[str, Forward]:
    """What is timed, by name. The twins' runs stay open, so that opening one is no part of a forward."""
    call = arguments()
    plain = flux()
    rival: Any = flux()
    rival.compile_repeated_blocks(fullgraph=True, dynamic=False)
    targets: dict[str, Any] = {"plain": plain, RIVAL: rival}
    for engine in (Compile(directory=str(folder)), AOT(directory=str(folder))):
        twin: Any = accelerate(flux(), [engine])
        opened.enter_context(twin.fastdit.run(1_000_000))
        targets[type(engine).__name__] = twin
    return {name: (lambda _, target=target: target(**call).sample) for name, target in targets.items()}


def main(
    rounds: Annotated[int, typer.Option(help="Rounds, in each of which every forward is timed once.")] = 60,
    batch: Annotated[int, typer.Option(help="Forwards that are timed together.")] = 5,
    profile: Annotated[str | None, typer.Option(help="Print what one of them spends, and time nothing.")] = None,
    out: Path = Path("benchmarks/results/host-time.json"),
) -> None:
    """Print milliseconds a forward and the ratio to diffusers' own compilation; exit 1 if the better engine's is above
    1.05."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), ExitStack() as opened:
        made = forwards(Path(folder), opened)
        expected = made["plain"](0)
        for name, forward in made.items():
            error = float((forward(0) - expected).norm() / expected.norm())
            if error > 1e-4:
                raise RuntimeError(f"{name} differs from the plain forward by {error:.1e}")
        if profile is not None:
            _print_profile(made[profile])
            return
        repeated = {
            name: (lambda number, forward=forward: [forward(number) for _ in range(batch)])
            for name, forward in made.items()
        }
        seconds = time_interleaved(repeated, rounds=rounds, warmup=3)
    milliseconds = {name: 1e3 * median(values) / batch for name, values in seconds.items()}
    ratios = {name: median_of_ratios(seconds[name], seconds[RIVAL]) for name in seconds if name != RIVAL}
    print(
        f"{Environment.capture()}; {DOUBLE} double and {SINGLE} single blocks, one thread, {rounds} rounds of {batch}"
    )
    for name, value in milliseconds.items():
        print(f"{name:24} {value:6.2f} ms" + (f", {ratios[name]:.3f} of the rival" if name in ratios else ""))
    values = {"blocks": [DOUBLE, SINGLE], "width": HEADS * HEAD_WIDTH, "tokens": TOKENS + TEXT, "threads": 1}
    values |= {"rounds": rounds, "batch": batch, "milliseconds": milliseconds, "ratios": ratios, "bar": BAR}
    save(out, {**values, "seconds": seconds})
    raise typer.Exit(min(ratios[name].estimate for name in ("Compile", "AOT")) > BAR)


def _print_profile(forward: Forward, repeats: int = 40) -> None:
    forward(0)
    with cProfile.Profile() as profile:
        for number in range(repeats):
            forward(number)
    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    typer.run(main)
