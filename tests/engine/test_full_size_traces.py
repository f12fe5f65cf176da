"""Blocks of published size trace in one graph, as `Compile` and `AOT` take them, on tensors without memory.

On "cuda" that wants a CUDA build of torch, and no driver: the CPU build makes such tensors and multiplies them, but its
`Tensor.__getitem__` asks for the device, which is not there. What is left for a GPU is Inductor's code itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdit import AOT, Compile
from fastdit.engine.compile import isolated, piece_under
from fastdit.engine.flat import Flat
from fastdit.engine.piece import PieceCall, blocks_of
from fastdit.structure import twin_with

TEXT = 512
PRECISION = torch.bfloat16

DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")),
]


def flux(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """FLUX.1-dev with a block of each kind, and a call of it for `side` tokens a side."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    empty = {"dtype": PRECISION}
    call = {
        "hidden_states": torch.empty(1, side * side, 64, **empty),
        "encoder_hidden_states": torch.empty(1, TEXT, 4096, **empty),
        "pooled_projections": torch.empty(1, 768, **empty),
        "timestep": torch.empty(1, **empty),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(side * side, 3),
        "txt_ids": torch.empty(TEXT, 3),
    }
    return model, call


def sd3(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion 3 medium with a last block and one that is not, `side` tokens a side, two branches."""
    model = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=24, caption_projection_dim=1536, sample_size=128, pos_embed_max_size=192
    )
    call = {
        "hidden_states": torch.empty(2, 16, 2 * side, 2 * side, dtype=PRECISION),
        "encoder_hidden_states": torch.empty(2, 333, 4096, dtype=PRECISION),
        "pooled_projections": torch.empty(2, 2048, dtype=PRECISION),
        "timestep": torch.empty(2, dtype=PRECISION),
    }
    return model, call


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors say that they are; they have no memory."""
    with FakeTensorMode(), torch.no_grad():
        yield torch.device(request.param)


def pieces(build: Any, side: int, device: torch.device) -> list[PieceCall]:
    """Give a call of each block of a model, as its own forward makes them."""
    model, call = build(side)
    model = twin_with(model, lambda tensor: _on(tensor, device))
    found: list[PieceCall] = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda *seen: found.append(PieceCall(*seen)), with_kwargs=True)
    model(**{name: _on(value, device) for name, value in call.items()})
    for block in blocks_of(model):
        block._forward_pre_hooks.clear()
    return found


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.empty(tensor.shape, dtype=PRECISION, device=device), requires_grad=False)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("build", [flux, sd3])
def test_compile_s_piece_is_one_graph_as_far_as_inductor_s_operations(
    build: Any, side: int, device: torch.device, tmp_path: Any
) -> None:
    for call in pieces(build, side, device):
        graphs: list[torch.fx.GraphModule] = []

        def lowered(graph: torch.fx.GraphModule, _: Any, kept: list[Any] = graphs) -> Any:
            kept.append(graph)
            return graph.forward

        backend = aot_autograd(fw_compiler=lowered, decompositions=select_decomp_table())
        tracing = Compile(attention="torch").tracing(call, tmp_path)
        compiled = isolated(piece_under(tracing), mode="default", dynamic=False, backend=backend)
        found, expected = compiled(call.module, call.args, call.kwargs), call.run()
        assert len(graphs) == 1
        assert shapes(found) == shapes(expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("build", [flux, sd3])
def test_aot_s_piece_is_exported_whole(build: Any, device: torch.device, tmp_path: Any) -> None:
    for call in pieces(build, 64, device):
        with AOT(attention="torch").tracing(call, tmp_path)():
            exported = torch.export.export(Flat(call), tuple(call.tensors))
        assert len(exported.graph_signature.user_inputs) == len(call.tensors)
        assert shapes(exported.module()(*call.tensors)) == shapes(call.run())


def shapes(output: Any) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    items = output if isinstance(output, (tuple, list)) else [output]
    return [(tuple(item.shape), item.dtype, item.device) for item in items if item is not None]
