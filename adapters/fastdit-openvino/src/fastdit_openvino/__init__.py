"""OpenVINO for the blocks of a model on a CPU: an engine for each block and stage, or for each block.

    engine(block, x) = OpenVINO's graph of block at x's shape, computed in the precision that was asked for

A block is exported by torch, converted, given the shapes of its stages and compiled; what is kept is the compiled blob.
OpenVINO copies weights, so every engine holds its own and is built anew when they change. Two things are never left to
OpenVINO: the precision (on processors with matrix units it would take bfloat16 for a float32 model, unasked), and the
check of shapes (a converted export accepts other sizes than it was exported for, and answers wrongly).
"""

from __future__ import annotations

import dataclasses
import io
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.flat import Output, prove
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.staged import Shapes, StagedEngine, exported, stage_of
from fastdit.errors import EngineBuildFailed, EngineMismatch, UnsupportedModel
from fastdit.nested import tensors_of
from fastdit.process import unheard_warnings

__all__ = ["OpenVINO"]

_BLOB = "engine.blob"

#: The largest error relative to the block's own output for which an engine is kept; bfloat16 anywhere allows more.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@register
@dataclasses.dataclass(frozen=True)
class OpenVINO(StagedEngine):
    """Run blocks by OpenVINO on the CPU.

    `precision` is what floating-point arithmetic is done in: "f32", or "bf16", which is faster on processors with
    units for it. Arguments and outputs keep the model's own types. `tokens` makes one engine of dynamic shape serve
    all the stages that it names: one copy of the weights instead of one a stage, for a little speed.

    `accelerate` raises `UnsupportedModel` where OpenVINO is missing or the model is not on the CPU.
    """

    _: dataclasses.KW_ONLY
    precision: Literal["f32", "bf16"] = "f32"

    bakes_weights: ClassVar[bool] = True
    reads_folder: ClassVar[bool] = False

    @property
    def settings(self) -> str:
        try:
            return f"{super().settings}, openvino {version('openvino')}"
        except PackageNotFoundError:
            return f"{super().settings}, no openvino"

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        _openvino()
        device = next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))
        if device.type != "cpu":
            raise UnsupportedModel(f"OpenVINO() runs on the CPU and the model is on {device}; use Compile() there")

    def build(self, call: PieceCall, folder: Path) -> Execute:
        tensors, shapes, built = call.tensors, self.shapes(call), (folder / _BLOB).exists()
        if not built:
            (folder / _BLOB).write_bytes(self._convert(call, shapes))
        compiled = _openvino().Core().import_model(io.BytesIO((folder / _BLOB).read_bytes()), "CPU", self._properties)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != self.precision:
            raise UnsupportedModel(f"this processor computes in {used} where {self.precision} was asked for")
        request = _Request(compiled)
        if not built:
            output = call.run()
            prove(tensors_of(output), request.infer(tensors), self._tolerance(call))
            Output.keep(output, folder)
        proved = {stage_of(tensors, shapes)} if len(shapes) == 1 or not built else set()
        return _Proved(request, shapes, Output(folder), self._tolerance(call), proved).execute

    def least_bytes(self, module: nn.Module) -> int:
        widest = 2 if self.precision == "bf16" else 4
        tensors = (*module.parameters(), *module.buffers())
        return sum(tensor.numel() * min(tensor.element_size(), widest) for tensor in tensors)

    @property
    def _properties(self) -> dict[str, object]:
        return {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }

    def _convert(self, call: PieceCall, shapes: tuple[Shapes, ...]) -> bytes:
        """Compile a piece for all of `shapes`, and give the blob."""
        openvino = _openvino()
        with unheard_warnings():  # the converter's remarks on torch
            model = openvino.convert_model(exported(call, shapes))
        model.reshape(
            {
                index: openvino.PartialShape(
                    [openvino.Dimension(min(sizes), max(sizes)) for sizes in zip(*each, strict=True)]
                )
                for index, each in enumerate(zip(*shapes, strict=True))
            }
        )
        blob: bytes = openvino.Core().compile_model(model, "CPU", self._properties).export_model().getvalue()
        return blob

    def _tolerance(self, call: PieceCall) -> float:
        asked = torch.bfloat16 if self.precision == "bf16" else torch.float32
        tensors = [*call.module.parameters(), *call.tensors]
        return max(_TOLERANCE.get(dtype, 0.0) for dtype in (asked, *(tensor.dtype for tensor in tensors)))


class _Request:
    """A compiled model that answers one call at a time, whichever thread it comes from."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def infer(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the outputs of row-major tensors, which OpenVINO reads in place."""
        with self._lock:
            outputs = self._request.infer([_shared(tensor) for tensor in tensors], share_inputs=True)
            return [_torch(output.element_type, outputs[output]) for output in self._request.model_outputs]


@dataclasses.dataclass(frozen=True)
class _Proved:
    """An engine whose first answer at each stage is compared with the block's own."""

    request: _Request
    shapes: tuple[Shapes, ...]
    output: Output
    tolerance: float
    proved: set[int]

    def execute(self, call: PieceCall) -> object:
        tensors = call.tensors
        stage = stage_of(tensors, self.shapes)
        found = self.request.infer(tensors)
        if stage not in self.proved:
            try:
                prove(tensors_of(call.run()), found, self.tolerance)
            except EngineBuildFailed as error:
                where = f"OpenVINO's engine of {type(call.module).__name__} at {self.shapes[stage]}"
                raise EngineMismatch(f"{where}: {error}") from error
            self.proved.add(stage)
        return self.output.of(found)


def _shared(tensor: torch.Tensor) -> Any:
    """Give a tensor's memory to OpenVINO; numpy knows no bfloat16."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    openvino = _openvino()
    shape = openvino.Shape(list(tensor.shape))
    return openvino.Tensor(tensor.view(torch.int16).numpy(), shape, openvino.Type.bf16)


def _torch(element_type: Any, array: Any) -> torch.Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if element_type.get_type_name() == "bf16" else found


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedModel(f"OpenVINO can't be imported ({error}); pip install openvino") from error
    return openvino
