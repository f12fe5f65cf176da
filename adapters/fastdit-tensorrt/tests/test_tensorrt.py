"""What can be known of the adapter without a GPU: refusals, keys, profiles, and what is kept for refitting."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdit_tensorrt
from fastdit import (
    InvalidConfig,
    Stack,
    UnsupportedModel,
    accelerate,
)
from fastdit.engine.piece import PieceCall
from fastdit.engine.staged import exported
from fastdit.errors import EngineBuildFailed, EngineWarning
from fastdit.testing import generate, tiny_flux
from fastdit_tensorrt import TensorRT, inputs_of
from fastdit_tensorrt.cache import SealedEngines


def piece(tokens: int = 25, text: int = 6, module: nn.Module | None = None, **kwargs: Any) -> PieceCall:
    """Give a call whose hidden states, text and joined positions have shapes as FLUX has them."""
    shapes = {"hidden_states": (1, tokens, 32), "encoder_hidden_states": (1, text, 32), "freqs": (tokens + text, 16)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return PieceCall(module or nn.Linear(32, 32), (), {**tensors, **kwargs}, (5, tokens // 5, "fine", "fine"))


def test_a_stack_with_it_is_read_where_nobody_has_imported_it() -> None:
    (entry,) = entry_points(group="fastdit.accelerators", name="TensorRT")
    assert entry.load() is TensorRT
    stack = Stack([TensorRT(tokens=(1024, 4096))])
    assert Stack.from_json(stack.to_json()) == stack


def test_a_model_on_a_cpu_is_refused_by_name_and_nothing_is_left_behind() -> None:
    pipeline, call = tiny_flux(steps=2)
    plain = generate(pipeline, call)
    with pytest.raises(UnsupportedModel, match="needs a CUDA device and the model is on cpu"):
        accelerate(pipeline, [TensorRT()])
    assert torch.equal(generate(pipeline, call), plain)


def test_a_bare_exception_at_import_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the published package does where the TensorRT libraries are missing.
    broken = tmp_path / "torch_tensorrt" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise Exception('Could not find libnvinfer.so.11')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(UnsupportedModel, match=r"Could not find libnvinfer.so.11; it needs torch 2.14 and"):
        fastdit_tensorrt._torch_tensorrt()


@pytest.mark.parametrize("tokens", [(16,), (16, 16), (16, 0), (16, 25.0), [16], 16])
def test_numbers_of_tokens_that_are_none_are_refused_by_name(tokens: Any) -> None:
    with pytest.raises(InvalidConfig, match="TensorRT's tokens"):
        TensorRT(tokens=tokens)


def test_every_named_stage_is_a_fixed_profile_of_each_tensor() -> None:
    def make(**options: Any) -> dict[str, Any]:
        return options

    call = piece(25)
    tensors = list(call.kwargs.values())
    expected = [[(1, 25, 32), (1, 36, 32)], [(1, 6, 32), (1, 6, 32)], [(31, 16), (42, 16)]]
    for given, shapes in zip(inputs_of(make, tensors, TensorRT(tokens=(25, 36)).shapes(call)), expected, strict=True):
        assert given["dtype"] == torch.float32
        for profile, shape in zip(given["profiles"], shapes, strict=True):
            assert profile == {"min_shape": shape, "opt_shape": shape, "max_shape": shape}
    static = [{"shape": tuple(tensor.shape), "dtype": torch.float32} for tensor in tensors]
    assert inputs_of(make, tensors, TensorRT().shapes(call)) == static


def test_the_stages_that_are_named_have_one_key_and_all_others_their_own() -> None:
    module = nn.Linear(32, 32)
    engine, plain = TensorRT(tokens=(25, 36)), TensorRT()
    assert engine.key(piece(25, module=module)) == engine.key(piece(36, module=module))
    different = [
        piece(16, module=module),
        piece(49, module=module),
        piece(25, 7, module=module),
        piece(25, module=module, scale=1.0),
        piece(25, module=nn.Linear(32, 32)),
        piece(25, module=nn.Linear(32, 32, bias=False)),
    ]
    keys = {engine.key(call).digest for call in (piece(25, module=module), *different)}
    assert len(keys) == 7
    assert plain.key(piece(25, module=module)) != plain.key(piece(36, module=module))


def test_text_as_long_as_a_stage_is_not_taken_for_the_image() -> None:
    call = piece(25, 36)
    assert len(TensorRT(tokens=(25, 36)).shapes(call)) == 1


def test_other_weights_are_another_engine_that_is_refitted_from_the_same_one() -> None:
    engine, module = TensorRT(), nn.Linear(32, 32)
    key, fingerprint = engine.key(piece(module=module)), engine._fingerprint(piece(module=module))
    module.weight.data += 0.1
    assert engine.key(piece(module=module)) != key
    assert engine._fingerprint(piece(module=module)) == fingerprint
    assert engine._fingerprint(piece(36, module=module)) != fingerprint


def test_a_program_is_exported_for_all_named_stages_or_refused_by_name() -> None:
    class Joined(nn.Module):
        def forward(self, hidden_states: Any, encoder_hidden_states: Any, freqs: Any) -> Any:
            joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            return joined * freqs.repeat(1, 2)

    class Fixed(Joined):
        def forward(self, hidden_states: Any, encoder_hidden_states: Any, freqs: Any) -> Any:
            return super().forward(hidden_states.view(1, 25, 32), encoder_hidden_states, freqs)

    engine = TensorRT(tokens=(25, 36))
    call, other = piece(25, module=Joined()), piece(36, module=Joined())
    program = exported(call, engine.shapes(call)).module()
    (found,) = program(*other.kwargs.values())
    torch.testing.assert_close(found, other.module(**other.kwargs))
    with pytest.raises(UnsupportedModel, match="leave `tokens` out"):
        exported(piece(25, module=Fixed()), engine.shapes(call))


def test_what_is_kept_for_refitting_belongs_to_one_piece_and_is_sealed(tmp_path: Path) -> None:
    cache = SealedEngines(str(tmp_path), "Block", "one")
    assert cache.load("graph") is None
    cache.save("graph", b"engine")
    assert cache.load("graph") == b"engine"
    assert SealedEngines(str(tmp_path), "Block", "other").load("graph") is None
    (kept,) = tmp_path.rglob("engine.bin")
    kept.write_bytes(b"evil!!")
    with pytest.warns(EngineWarning, match="has changed"):
        assert cache.load("graph") is None


def test_a_program_without_an_engine_of_tensorrt_is_refused_by_name() -> None:
    with pytest.raises(EngineBuildFailed, match="holds no TensorRT engine"):
        fastdit_tensorrt._Profiled(nn.Linear(2, 2), (((1, 2),),), None)
