"""What few bits cost and save on the tiny FLUX pipeline of `fastdit.testing`: `python -m fastdit_torchao`."""

from __future__ import annotations

import torch

from fastdit import UnsupportedModel, accelerate
from fastdit.testing import generate, tiny_flux
from fastdit_torchao import Quantize
from fastdit_torchao.copies import linear_layers
from fastdit_torchao.layers import bytes_of

STEPS = 12


def main() -> None:
    """Print a row for each precision: bytes of the linear layers, and the error of the latents after 12 steps."""
    for dtype in (torch.float32, torch.bfloat16):
        pipeline, call = tiny_flux(steps=STEPS)
        pipeline.transformer.to(dtype)
        call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
        plain = generate(pipeline, call).double()
        layers = linear_layers(pipeline.transformer)
        full = sum(layer.weight.nbytes for layer in layers)
        print(f"{str(dtype).removeprefix('torch.'):8} plain {full:8,} bytes in {len(layers)} linear layers")
        for precision in ("int8", "fp8", "int4"):
            try:
                found = generate(accelerate(pipeline, [Quantize(precision)]), call).double()
            except UnsupportedModel as error:
                print(f"         {precision:5} refused: {error}")
                continue
            few = sum(bytes_of(precision, layer) for layer in layers)
            off = float((found - plain).norm() / plain.norm())
            print(f"         {precision:5} {few:8,} bytes, {full / few:.2f} times fewer, relative error {off:.4f}")


if __name__ == "__main__":
    main()
