"""Signals: what the first block's attention really receives, in every family, and time embeddings without latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from fastdit import InvalidConfig
from fastdit.models.signals import (
    MODULATED_SIGNALS,
    PROJECTED_TIME_SIGNALS,
    SIGNAL_KINDS,
    TIME_SIGNALS,
    modulated_signal,
    signal_for,
)
from fastdit.step_cache.watching import WatchedBlock

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

Call = tuple[Any, Tensor, tuple[Any, ...], dict[str, Any]]
LISTS = ("transformer_blocks", "double_stream_blocks", "joint_transformer_blocks", "blocks", "layers")


def first_block(transformer: nn.Module) -> Any:
    """The first block of the main stack, whatever the list is called."""
    return next(getattr(transformer, name)[0] for name in LISTS if hasattr(transformer, name))


def attention_of(block: Any) -> nn.Module:
    block = getattr(block, "block", block)
    return next(getattr(block, name) for name in ("attn", "attn1", "attention") if hasattr(block, name))


def observed(transformer: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], list[Tensor]]:
    """The calls of the first block and what its attention was given in each."""
    block = first_block(transformer)
    stream = list(inspect.signature(type(block).forward).parameters)[1]
    calls: list[Call] = []
    inputs: list[Tensor] = []

    def note_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((block, (args[0] if args else kwargs[stream]).clone(), args, kwargs))

    def note_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    with ExitStack() as stack:
        for module, hook in ((block, note_call), (attention_of(block), note_input)):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    return calls, inputs


def pipeline_calls(name: str) -> tuple[list[Call], list[Tensor]]:
    pipe, call = tiny.PIPELINES[name](steps=2)
    return observed(pipe.transformer, lambda: tiny.run(pipe, call))


def transformer_calls(name: str, **changes: Any) -> tuple[list[Call], list[Tensor]]:
    model, call = tiny.TRANSFORMERS[name]()
    return observed(model, lambda: model(**{**call, **changes}))


def assert_modulated(calls: list[Call], inputs: list[Tensor]) -> None:
    assert len(calls) == len(inputs) > 0
    for (block, hidden_states, args, kwargs), received in zip(calls, inputs, strict=True):
        signal = modulated_signal(block)
        assert signal is not None
        found = signal(block, hidden_states, args, kwargs)
        assert found.dtype == received.dtype
        assert torch.equal(found, received)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_pipeline_s_modulated_signal_is_what_the_first_attention_receives(name: str) -> None:
    assert_modulated(*pipeline_calls(name))


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_a_transformer_s_modulated_signal_is_what_the_first_attention_receives(name: str) -> None:
    assert_modulated(*transformer_calls(name))


def test_every_described_block_class_is_proven() -> None:
    pipelines = {type(first_block(build()[0].transformer)).__name__ for build in tiny.PIPELINES.values()}
    transformers = {type(first_block(build()[0])).__name__ for build in tiny.TRANSFORMERS.values()}
    inner = {"HiDreamImageTransformerBlock"}  # the same function, by the wrapper that the model calls
    assert pipelines | transformers | inner == set(MODULATED_SIGNALS)
    assert {*TIME_SIGNALS, *PROJECTED_TIME_SIGNALS} <= pipelines | transformers


def test_the_wrapped_block_of_hidream_gives_the_same_signal_as_its_wrapper() -> None:
    ((block, hidden_states, args, kwargs),), (received,) = transformer_calls("hidream")
    signal = modulated_signal(block.block)
    assert signal is not None
    assert torch.equal(signal(block.block, hidden_states, args, kwargs), received)


def test_arguments_may_come_by_place_or_by_name() -> None:
    calls, (received, *_) = pipeline_calls("flux")
    block, hidden_states, _, kwargs = calls[0]
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    signal = modulated_signal(block)
    assert signal is not None
    for count in range(len(names)):
        args = tuple(kwargs.get(name) for name in names[:count])
        rest = {name: value for name, value in kwargs.items() if name not in names[:count]}
        assert torch.equal(signal(block, hidden_states, args, rest), received)


def test_the_signal_follows_the_hidden_states_that_are_given_and_not_those_of_the_call() -> None:
    calls, (received, *_) = pipeline_calls("flux")
    block, hidden_states, args, kwargs = calls[0]
    signal = modulated_signal(block)
    assert signal is not None
    assert not torch.equal(signal(block, hidden_states + 1.5 * hidden_states.flip(1), args, kwargs), received)


def test_what_shows_the_parts_of_a_block_is_described_by_the_block_s_class() -> None:
    for name in ("flux", "z-image", "wan"):
        calls, inputs = pipeline_calls(name)
        assert_modulated([(WatchedBlock(block), *rest) for block, *rest in calls], inputs)  # type: ignore[misc]


def test_clean_and_noisy_tokens_of_z_image_are_scaled_apart() -> None:
    calls, _ = pipeline_calls("z-image")
    block, hidden_states, args, _ = calls[0]
    mask = (torch.arange(hidden_states.shape[1]) % 2)[None].expand(hidden_states.shape[:2])
    embeddings = {"adaln_noisy": args[3], "adaln_clean": 0.5 * args[3]}
    inputs: list[Tensor] = []
    handle = block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    block(*args[:3], noise_mask=mask, **embeddings)
    handle.remove()
    signal = modulated_signal(block)
    assert signal is not None
    assert torch.equal(signal(block, hidden_states, args[:3], {"noise_mask": mask, **embeddings}), inputs[0])


def test_wan_with_a_noise_level_for_each_token_is_modulated_by_token() -> None:
    pipe, call = tiny.wan(steps=1)
    ((args, kwargs), *_) = tiny.recorded_calls(pipe, call)
    tokens = kwargs["hidden_states"][0, 0, :, ::2, ::2].numel()
    timestep = torch.linspace(100.0, 900.0, tokens)[None]
    calls, inputs = observed(pipe.transformer, lambda: pipe.transformer(*args, **{**kwargs, "timestep": timestep}))
    assert calls[0][2][2].ndim == 4
    assert_modulated(calls, inputs)


def time_signals(calls: list[Call], kind: str) -> list[Tensor]:
    found = []
    for block, hidden_states, args, kwargs in calls:
        signal = signal_for(block, kind)
        assert signal is not None
        found.append(signal(block, hidden_states, args, kwargs))
    return found


@pytest.mark.parametrize("name", ["cogvideox", "consisid", "lumina2"])
def test_a_time_embedding_depends_on_the_noise_level_and_on_nothing_else(name: str) -> None:
    _, call = tiny.TRANSFORMERS[name]()
    changes = {key: torch.roll(call[key], 1, dims=-1) for key in ("hidden_states", "encoder_hidden_states")}
    (plain,) = time_signals(transformer_calls(name)[0], "time_embedding")
    (other,) = time_signals(transformer_calls(name, **changes)[0], "time_embedding")
    (later,) = time_signals(transformer_calls(name, timestep=call["timestep"] // 2)[0], "time_embedding")
    assert plain.ndim == 2
    assert torch.equal(plain, other)
    assert not torch.equal(plain, later)


def test_wan_s_projected_time_embedding_depends_on_the_noise_level_and_on_nothing_else() -> None:
    pipe, call = tiny.wan(steps=2)
    found = []
    for seed in (0, 1):
        calls, _ = observed(pipe.transformer, lambda seed=seed: tiny.run(pipe, call, seed=seed))
        found.append(time_signals(calls, "projected_time_embedding"))
    assert [signal.shape[1] for signal in found[0]] == [6] * 4
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], found[0][1])  # both guidance branches of a step
    assert not torch.equal(found[0][0], found[0][2])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wan", "time_embedding"),
        ("flux", "time_embedding"),
        ("flux", "projected_time_embedding"),
        ("flux", "first_block_residual"),
    ],
)
def test_a_signal_that_no_argument_carries_is_not_made_up(name: str, kind: str) -> None:
    block = first_block(tiny.PIPELINES[name]()[0].transformer)
    assert signal_for(block, kind) is None


def test_the_hidden_states_signal_is_the_block_s_input_in_every_family() -> None:
    calls, _ = pipeline_calls("sd3")
    signal = signal_for(calls[0][0], "hidden_states")
    assert signal is not None
    assert signal(*calls[0]) is calls[0][1]


def test_blocks_without_modulation_have_no_modulated_signal() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    z_image, _ = tiny.z_image()
    lumina, _ = tiny.TRANSFORMERS["lumina2"]()
    assert modulated_signal(z_image.transformer.context_refiner[0]) is None
    assert modulated_signal(lumina.context_refiner[0]) is None
    assert modulated_signal(BasicTransformerBlock(8, 1, 8)) is None
    assert modulated_signal(nn.Linear(2, 2)) is None


def test_an_unknown_kind_of_signal_names_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="modulated, time_embedding, projected_time_embedding"):
        signal_for(nn.Linear(2, 2), "output")
    assert all(signal_for(nn.Linear(2, 2), kind) is None for kind in SIGNAL_KINDS if kind != "hidden_states")
