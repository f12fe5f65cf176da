"""Twins of models whose linear layers have few bits, made when they are first wanted and again when a model changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TypeGuard

from torch import nn

from fastdit.engine.checksum import weights_of
from fastdit.engine.fingerprint import Structure
from fastdit.errors import UnsupportedModel
from fastdit.structure import behaves_otherwise, structural_twin

#: Where LoRA keeps the layer that it adds to; the layers that it adds are small, and stay as they are.
_ADDED_TO = "base_layer"

#: What stands for behaviour that was put on a part of a model, by offloading and casting.
_PUT_ON = ("forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")

_State = tuple[object, ...]


class Copies:
    """The twins of models, and their layers of few bits, each for as long as what it was made of lives."""

    def __init__(self, make: Callable[[nn.Linear], nn.Module]) -> None:
        self._make = make
        self._layers: weakref.WeakKeyDictionary[nn.Module, tuple[_State, nn.Module]] = weakref.WeakKeyDictionary()
        self._twins: weakref.WeakKeyDictionary[nn.Module, tuple[Structure, nn.Module]] = weakref.WeakKeyDictionary()
        self._weights: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def begin(self, model: nn.Module) -> None:
        """See at the start of a run whether weights are other ones, in whatever way they were written.

        Raises `UnsupportedModel` where a twin would leave something out.
        """
        refuse_foreign_parts(model)
        layers = linear_layers(model)
        weights = weights_of(nn.ParameterList([layer.weight for layer in layers]))
        if self._weights.get(model) not in (None, weights):
            for layer in layers:
                self._layers.pop(layer, None)
            self._twins.pop(model, None)
        self._weights[model] = weights

    def twin_of(self, model: nn.Module) -> nn.Module:
        """Give a model's twin of few bits; the model itself where there is nothing to quantise."""
        known = self._twins.get(model)
        if known is None or not known[0].unchanged:
            lists = {name: self._twin(blocks) for name, blocks in _block_lists(model)}
            known = self._twins[model] = Structure(model, values=True), structural_twin(model, lists)
        return known[1]

    def hand_over(self, model: nn.Module) -> None:
        """Put layers of few bits in the place of a model's own."""
        for parent, name, layer in list(_places(model)):
            parent._modules[name] = self._make(layer)

    def _twin(self, module: nn.Module) -> nn.Module:
        made = {name: self._layer(child) if _plain(child) else self._twin(child) for name, child in _inside(module)}
        changed = {name: twin for name, twin in made.items() if twin is not module._modules[name]}
        return structural_twin(module, changed) if changed else module

    def _layer(self, layer: nn.Linear) -> nn.Module:
        weight, bias = layer.weight, layer.bias
        version = 0 if weight.is_inference() else weight._version
        state = id(weight), version, weight.data_ptr(), weight.dtype, weight.device, id(bias)
        known = self._layers.get(layer)
        if known is None or known[0] != state:
            known = self._layers[layer] = state, self._make(layer)
        return known[1]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """List the linear layers of plain weights in a model's block lists, each once."""
    return list(dict.fromkeys(layer for _, _, layer in _places(model)))


def refuse_foreign_parts(model: nn.Module) -> None:
    """Raise `UnsupportedModel` where something sits on a part that a copy of it would leave out."""
    replaced = set(linear_layers(model))
    for name, blocks in _block_lists(model):
        for path, part in blocks.named_modules():
            foreign = behaves_otherwise(part) if part in replaced else any(map(part.__dict__.get, _PUT_ON))
            if foreign:
                raise UnsupportedModel(
                    f"{name}.{path} of {type(model).__name__} has a hook or a forward of its own (of an offloading "
                    "library, or compiled), which a copy of few bits would leave out; offload whole models, take it "
                    "off, or leave Quantize out"
                )


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in model.named_children() if isinstance(child, nn.ModuleList))


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Walk through the linear layers of a model's block lists: what holds each, under which name."""
    for _, blocks in _block_lists(model):
        yield from _places_in(blocks)


def _places_in(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for name, child in _inside(module):
        if _plain(child):
            yield module, name, child
        else:
            yield from _places_in(child)


def _plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer of plain weights."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the parts of a module to be looked into; of a layer with LoRA, what it adds to."""
    names = (_ADDED_TO,) if _ADDED_TO in module._modules else tuple(module._modules)
    return ((name, child) for name in names if (child := module._modules[name]) is not None)
