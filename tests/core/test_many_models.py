"""Wiring by observation on many models: right or refused by name, never silently wrong.

The oracle needs no knowledge of a model: where every step has the same inputs, a step that skips its blocks and reuses
what they added must give what the step that ran them gave.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tiny
from fastdit import (
    FirstBlockCache,
    Interval,
    InvalidConfig,
    SkipPolicy,
    StepMask,
    UnsupportedModel,
    accelerate,
)

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    # Chroma and Mochi, inside diffusers.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]

noise = tiny.randn
Case = tuple[nn.Module, dict[str, Any]]


def model(name: str, config: dict[str, Any], **inputs: Any) -> Case:
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this version of diffusers has no {name}")
    made = cls(**config).eval()
    tiny.seed_weights(made, 0)
    return made, {**inputs, "return_dict": False}


def grid_ids(side: int) -> Tensor:
    return torch.tensor([[0.0, r, c] for r in range(side) for c in range(side)])


def chroma() -> Case:
    config = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return model(
        "ChromaTransformer2DModel",
        config,
        hidden_states=noise(1, 16, 8, seed=1),
        encoder_hidden_states=noise(1, 5, 32, seed=2),
        timestep=torch.tensor([0.5]),
        img_ids=grid_ids(4),
        txt_ids=torch.zeros(5, 3),
    )


def aura_flow() -> Case:
    config = {
        "sample_size": 8,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    }
    return model(
        "AuraFlowTransformer2DModel",
        config,
        hidden_states=noise(1, 4, 8, 8, seed=1),
        encoder_hidden_states=noise(1, 5, 32, seed=2),
        timestep=torch.tensor([0.5]),
    )


def sana() -> Case:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "sample_size": 8,
    }
    return model(
        "SanaTransformer2DModel",
        config,
        hidden_states=noise(1, 4, 8, 8, seed=1),
        encoder_hidden_states=noise(1, 5, 8, seed=2),
        timestep=torch.tensor([500.0]),
    )


def lumina2() -> Case:
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "scaling_factor": 1.0,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 32,
    }
    return model(
        "Lumina2Transformer2DModel",
        config,
        hidden_states=noise(2, 4, 8, 8, seed=1),
        timestep=torch.tensor([0.5, 0.5]),
        encoder_hidden_states=noise(2, 6, 32, seed=2),
        encoder_attention_mask=torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
    )


def ltx() -> Case:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": 16,
    }
    return model(
        "LTXVideoTransformer3DModel",
        config,
        hidden_states=noise(1, 2 * 4 * 4, 4, seed=1),
        encoder_hidden_states=noise(1, 5, 16, seed=2),
        timestep=torch.tensor([500.0]),
        encoder_attention_mask=torch.ones(1, 5),
        num_frames=2,
        height=4,
        width=4,
    )


def cogvideox() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 8,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 8,
        "max_text_seq_length": 8,
    }
    return model(
        "CogVideoXTransformer3DModel",
        config,
        hidden_states=noise(1, 2, 4, 8, 8, seed=1),
        encoder_hidden_states=noise(1, 8, 8, seed=2),
        timestep=torch.tensor([500]),
    )


def mochi() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    }
    return model(
        "MochiTransformer3DModel",
        config,
        hidden_states=noise(1, 4, 2, 8, 8, seed=1),
        encoder_hidden_states=noise(1, 16, 16, seed=2),
        timestep=torch.tensor([500]),
        encoder_attention_mask=torch.ones(1, 16).bool(),
    )


def dit() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    return model(
        "DiTTransformer2DModel",
        config,
        hidden_states=noise(1, 4, 8, 8, seed=1),
        timestep=torch.tensor([500]),
        class_labels=torch.tensor([3]),
    )


def hunyuan_dit() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 4,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 4,
        "text_len": 4,
        "text_len_t5": 4,
        "activation_fn": "gelu-approximate",
        "use_style_cond_and_image_meta_size": True,
    }
    angles = noise(16, 8, seed=9)
    return model(
        "HunyuanDiT2DModel",
        config,
        hidden_states=noise(1, 4, 8, 8, seed=1),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=noise(1, 4, 8, seed=2),
        text_embedding_mask=torch.ones(1, 4),
        encoder_hidden_states_t5=noise(1, 4, 8, seed=3),
        text_embedding_mask_t5=torch.ones(1, 4),
        image_meta_size=noise(1, 6, seed=4),
        style=torch.tensor([0]),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


def hunyuan_video() -> Case:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    return model(
        "HunyuanVideoTransformer3DModel",
        config,
        hidden_states=noise(1, 4, 2, 4, 4, seed=1),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 6, 16, seed=2),
        encoder_attention_mask=torch.ones(1, 6),
        pooled_projections=noise(1, 8, seed=3),
        guidance=torch.tensor([6000.0]),
    )


def cogview4() -> Case:
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 4,
        "num_attention_heads": 4,
        "text_embed_dim": 8,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    return model(
        "CogView4Transformer2DModel",
        config,
        hidden_states=noise(1, 4, 8, 8, seed=1),
        encoder_hidden_states=noise(1, 5, 8, seed=2),
        timestep=torch.tensor([500]),
        original_size=torch.tensor([[64.0, 64.0]]),
        target_size=torch.tensor([[64.0, 64.0]]),
        crop_coords=torch.tensor([[0.0, 0.0]]),
    )


def latte() -> Case:
    config = {
        "sample_size": 8,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_channels": 32,
        "in_channels": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "video_length": 2,
    }
    return model(
        "LatteTransformer3DModel",
        config,
        hidden_states=noise(1, 4, 2, 8, 8, seed=1),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 5, 32, seed=2),
    )


def stable_audio() -> Case:
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "out_channels": 4,
        "cross_attention_dim": 16,
        "time_proj_dim": 8,
        "global_states_input_dim": 8,
        "cross_attention_input_dim": 8,
    }
    angles = noise(5, 4, seed=9)
    return model(
        "StableAudioDiTModel",
        config,
        hidden_states=noise(1, 4, 4, seed=1),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 5, 8, seed=2),
        global_hidden_states=noise(1, 1, 8, seed=3),
        rotary_embedding=(angles.cos(), angles.sin()),
    )


class Layer(nn.Module):
    """A residual layer that mixes tokens and channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inside = nn.Linear(width, width)

    def forward(self, stream: Tensor, *, scale: float = 1.0) -> Tensor:
        return stream + scale * torch.tanh(self.inside(stream + stream.mean(dim=1, keepdim=True)))


class Stacked(nn.Module):
    """Layers one after another; the subclasses go wrong in a way each."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(count))
        self.out = nn.Linear(8, 8)
        tiny.seed_weights(self, 2)

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream)
        return self.out(stream)


class LongSkips(Stacked):
    """A U: what the first half leaves is added in the second."""

    def forward(self, stream: Tensor) -> Tensor:
        first = self.blocks[0](stream)
        second = self.blocks[1](first)
        third = self.blocks[2](second + stream)
        return self.out(self.blocks[3](third + first))


class JoinedBlock(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(16, 8)

    def forward(self, stream: Tensor, skip: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        joined = stream if skip is None else self.join(torch.cat([stream, skip], dim=-1))
        return super().forward(joined, scale=scale)


class KeptForLater(Stacked):
    """Hunyuan-DiT's long skips: later blocks get what the forward kept of earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JoinedBlock() for _ in range(8))
        tiny.seed_weights(self, 8)

    def forward(self, stream: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            stream = block(stream, kept.pop() if index >= 5 else None)
            if index < 3:
                kept.append(stream)
        return self.out(stream)


class Emptying(Stacked):
    """Hunyuan-DiT under a ControlNet: the forward empties a list that it is given."""

    def forward(self, stream: Tensor, residuals: list[Tensor] | None = None) -> Tensor:
        stream = super().forward(stream)
        while residuals:
            stream = stream + residuals.pop()
        return stream


class Memory:
    """Grows with every forward that writes to it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Remembering(Stacked):
    """A cache of keys and values: the forward writes to an object that it is given, and reads it."""

    def forward(self, stream: Tensor, memory: Memory | None = None) -> Tensor:
        if memory is not None:
            memory.seen.append(stream)
            stream = stream + sum(memory.seen)
        return super().forward(stream)


class Collecting(Stacked):
    """The output is made of every block's state."""

    def forward(self, stream: Tensor) -> Tensor:
        states = []
        for block in self.blocks:
            stream = block(stream)
            states.append(stream)
        return self.out(torch.stack(states).mean(dim=0))


class LastButOne(Stacked):
    """The output is taken before the last block, which runs for nothing."""

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            stream = block(stream)
        self.blocks[-1](stream)
        return self.out(stream)


class Repeated(Stacked):
    """One block is called twice."""

    def forward(self, stream: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[0]):
            stream = block(stream)
        return self.out(stream)


class SameModule(Stacked):
    """One module is in the list twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.blocks[0])


class Writing(Stacked):
    """Something between the blocks writes into the stream in place."""

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream)
            stream.mul_(0.9)
        return self.out(stream)


class Scaling(Stacked):
    """Something between the blocks makes a new stream."""

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream) * 0.9
        return self.out(stream)


class Alternating(Stacked):
    """Blocks of two lists in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Layer() for _ in range(4))
        tiny.seed_weights(self.others, 3)

    def forward(self, stream: Tensor) -> Tensor:
        for block, other in zip(self.blocks, self.others, strict=True):
            stream = other(block(stream), scale=0.5)
        return self.out(stream)


class TwoStreams(Stacked):
    """Two independent streams go through the same list, one after the other."""

    def forward(self, stream: Tensor) -> Tensor:
        one, other = stream, -stream
        for block in self.blocks:
            one = block(one)
        for block in self.blocks:
            other = block(other)
        return self.out(one - 0.5 * other)


class Gated(Stacked):
    """How many blocks run hangs on the input."""

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks[: 4 if float(stream.sum()) > 0 else 2]:
            stream = block(stream)
        return self.out(stream)


class Changing(nn.Module):
    """The stream's width changes half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(8), Layer(8), Layer(4), Layer(4)])
        self.narrow = nn.Linear(8, 4)
        tiny.seed_weights(self, 4)

    def forward(self, stream: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            stream = block(self.narrow(stream) if index == 2 else stream)
        return stream


class InPlaceBlock(Layer):
    def forward(self, stream: Tensor, *, scale: float = 1.0) -> Tensor:
        stream += scale * torch.tanh(self.inside(stream))
        return stream


class InPlaceBlocks(Stacked):
    """Blocks that write their result into their input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock() for _ in range(4))
        tiny.seed_weights(self, 5)

    def forward(self, stream: Tensor) -> Tensor:
        return super().forward(stream.clone())


class SideChannel(Stacked):
    """Each block hands the next a second tensor that is not a residual of anything."""

    class Block(Layer):
        def forward(self, stream: Tensor, note: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return stream + torch.tanh(self.inside(stream * note)), torch.sigmoid(self.inside(stream))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))
        tiny.seed_weights(self, 6)

    def forward(self, stream: Tensor) -> Tensor:
        note = torch.ones_like(stream)
        for block in self.blocks:
            stream, note = block(stream, note)
        return self.out(stream * note)


class DictBlocks(Stacked):
    """Blocks that answer with a dictionary."""

    class Block(Layer):
        def forward(self, stream: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"stream": stream + torch.tanh(self.inside(stream))}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))
        tiny.seed_weights(self, 7)

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream)["stream"]
        return self.out(stream)


def by_hand(cls: Callable[[], nn.Module]) -> Callable[[], Case]:
    return lambda: (cls().eval(), {"stream": noise(2, 5, 8, seed=1)})


MODELS: dict[str, Callable[[], Case]] = {
    function.__name__: function
    for function in (
        chroma,
        aura_flow,
        sana,
        lumina2,
        ltx,
        cogvideox,
        mochi,
        dit,
        hunyuan_dit,
        hunyuan_video,
        cogview4,
        latte,
        stable_audio,
    )
}
HAND_MADE: dict[str, Callable[[], Case]] = {
    cls.__name__: by_hand(cls)
    for cls in (
        Stacked,
        LongSkips,
        KeptForLater,
        Collecting,
        LastButOne,
        Repeated,
        SameModule,
        Writing,
        Scaling,
        Alternating,
        TwoStreams,
        Gated,
        Changing,
        InPlaceBlocks,
        SideChannel,
        DictBlocks,
    )
}
MUST_WORK = (
    "chroma",
    "aura_flow",
    "sana",
    "lumina2",
    "ltx",
    "cogvideox",
    "mochi",
    "hunyuan_video",
    "cogview4",
    "Stacked",
)
"""Models that are in wide use, or as plain as can be: refusing them would be a defect."""


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else first(value[0])


@pytest.mark.parametrize("name", [*MODELS, *HAND_MADE])
@pytest.mark.parametrize("gate", ["mask", "first block", "1 and 1", "1 and 2", "3 and 1", "2 and 3"])
def test_skipping_a_step_whose_inputs_are_the_same_gives_the_same_output_or_the_model_is_refused(
    name: str, gate: str
) -> None:
    made, inputs = {**MODELS, **HAND_MADE}[name]()
    plain = first(made(**inputs))
    assert torch.equal(first(made(**inputs)), plain)
    policy = SkipPolicy(first=1, last=0)
    leading, _, trailing = gate.partition(" and ")
    cache: Any = StepMask((1, 0, 1, 0), policy=policy) if gate == "mask" else FirstBlockCache(1e6, policy=policy)
    if trailing:
        cache = FirstBlockCache(1e6, leading=int(leading), trailing=int(trailing), policy=policy)
    try:
        twin = accelerate(made, [cache])
        with twin.fastdit.run(num_inference_steps=4):
            found = [first(twin(**inputs)) for _ in range(4)]
    except InvalidConfig as error:
        assert trailing and "leaves no block" in str(error)
        return
    except UnsupportedModel as error:
        assert name not in MUST_WORK, str(error)
        assert type(made).__name__ in str(error)
        assert torch.equal(first(made(**inputs)), plain)
        return
    skipped = [step.action != "computed" for step in twin.fastdit.last_run.steps]
    assert skipped == [False, True, gate != "mask", True]
    for step, output in enumerate(found):
        if skipped[step]:
            torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().mean()))
        else:
            assert torch.equal(output, plain)
    assert torch.equal(first(made(**inputs)), plain)


@pytest.mark.parametrize("name", [*MODELS, *HAND_MADE])
def test_a_neutral_cache_is_bit_equal_on_inputs_that_change_or_the_model_is_refused(name: str) -> None:
    made, inputs = {**MODELS, **HAND_MADE}[name]()
    key = "stream" if name in HAND_MADE else "hidden_states"
    steps = [{**inputs, key: inputs[key] * (1.0 + 0.3 * step) * (-1) ** step} for step in range(4)]
    plain = [first(made(**step)) for step in steps]
    for stack in ([], [FirstBlockCache(0.0)]):
        try:
            twin = accelerate(made, stack)
            with twin.fastdit.run(num_inference_steps=4):
                found = [first(twin(**step)) for step in steps]
        except UnsupportedModel:
            assert stack
            assert name not in MUST_WORK
            continue
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


@pytest.mark.parametrize(("trailing", "refused"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_cut_is_proved_with_the_trailing_blocks_that_it_leaves(trailing: int, refused: bool) -> None:
    made, inputs = HAND_MADE["KeptForLater"]()
    twin = accelerate(made, [FirstBlockCache(1e6, trailing=trailing, policy=SkipPolicy(last=0))])
    with twin.fastdit.run(num_inference_steps=2):
        if refused:
            with pytest.raises(UnsupportedModel, match=rf"blocks\.1 to blocks\.{7 - trailing} .* such as a long skip"):
                twin(**inputs)
        else:
            torch.testing.assert_close([twin(**inputs) for _ in range(2)][1], made(**inputs))


@pytest.mark.parametrize("cache", [Interval(2, policy=SkipPolicy(last=0)), FirstBlockCache(0.0)], ids=str)
@pytest.mark.parametrize("kind", [Emptying, Remembering])
def test_what_a_forward_empties_or_writes_to_is_not_touched_by_the_observation(kind: Any, cache: Any) -> None:
    made, inputs = by_hand(kind)()

    def call() -> dict[str, Any]:
        if kind is Emptying:
            return {**inputs, "residuals": [noise(2, 5, 8, seed=seed) for seed in (2, 3)]}
        return {**inputs, "memory": Memory()}

    plain = made(**call())
    for _ in range(2):
        twin = accelerate(made, [cache])
        with twin.fastdit.run(num_inference_steps=3):
            assert torch.equal(twin(**call()), plain)


@pytest.mark.parametrize("where", ["stream", "blocks.1.inside.bias", "out.bias"])
def test_numbers_that_are_not_finite_are_no_reason_to_refuse_a_model(where: str) -> None:
    made, inputs = HAND_MADE["Stacked"]()
    spoiled = inputs["stream"] if where == "stream" else made.get_parameter(where).data
    spoiled.view(-1)[0] = float("nan")
    plain = made(**inputs)
    twin = accelerate(made, [FirstBlockCache(0.0)])
    with twin.fastdit.run(num_inference_steps=2):
        for _ in range(2):
            torch.testing.assert_close(twin(**inputs), plain, rtol=0, atol=0, equal_nan=True)


def test_a_threshold_of_zero_computes_even_where_nothing_changes() -> None:
    made, inputs = HAND_MADE["Stacked"]()
    twin = accelerate(made, [FirstBlockCache(0.0)])
    with twin.fastdit.run(num_inference_steps=3):
        found = [first(twin(**inputs)) for _ in range(3)]
    assert [step.action for step in twin.fastdit.last_run.steps] == ["computed"] * 3
    assert all(torch.equal(output, found[0]) for output in found)


def test_the_table_has_no_doubles() -> None:
    assert not set(MODELS) & set(HAND_MADE)
    assert all(one is not other for one, other in itertools.combinations(MODELS.values(), 2))
