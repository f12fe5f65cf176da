"""How the tiny models are made: real classes of diffusers with seeded weights, thousands of times smaller.

Nothing is downloaded and nothing is mocked. `fastdit.testing.models` lists the pipelines and transformers there are,
`fastdit.testing.configurations` what they are made of.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from fastdit.errors import UnsupportedModel
from fastdit.testing.configurations import AUTOENCODERS, TRANSFORMERS, Configuration

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, SchedulerMixin

#: The keyword arguments of a call.
Call = dict[str, Any]
Built = tuple["DiffusionPipeline", Call]
#: (height, width) in pixels, or the side of a square.
Size = int | tuple[int, int]


def seed_weights(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Give every parameter a seeded value under which no part of the model is degenerate.

    Matrices keep the variance of their input (times `gain`), norms stay near one, biases and tables are visible: each
    block changes its input noticeably, and differently at each noise level.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "scale_shift_table" in name:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif name.endswith(("weight", "gamma")):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def randn(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal noise of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_diffusers(name: str) -> Callable[..., Any]:
    """Find a class of diffusers by its name. Raises `UnsupportedModel` where the installed version has none."""
    if not hasattr(diffusers, name):
        raise UnsupportedModel(f"diffusers {diffusers.__version__} has no {name}; install a version that has it")
    found: Callable[..., Any] = getattr(diffusers, name)
    return found


def component(
    name: str, changes: Configuration | None = None, *, seed: int | None = None, gain: float = 1.0
) -> nn.Module:
    """Make a transformer or an autoencoder by its class's name, its configuration changed by `changes`."""
    configuration = {**TRANSFORMERS.get(name, {}), **AUTOENCODERS.get(name, {}), **(changes or {})}
    model: nn.Module = of_diffusers(name)(**configuration).eval()
    seed_weights(model, int(name in AUTOENCODERS) if seed is None else seed, gain)
    return model


def flux_transformer(
    *, guidance: bool = True, seed: int = 0, layers: int = 2, single_layers: int = 3, gain: float = 1.0
) -> FluxTransformer2DModel:
    """Make a FLUX transformer with double and single blocks, two heads of 16."""
    changes = {"guidance_embeds": guidance, "num_layers": layers, "num_single_layers": single_layers}
    return component("FluxTransformer2DModel", changes, seed=seed, gain=gain)


def kl_autoencoder(*, latent_channels: int = 4, levels: int = 4, seed: int = 1, gain: float = 1.0) -> AutoencoderKL:
    """Make an AutoencoderKL that shrinks each side by 2 ** (levels - 1); its pictures span black to white."""
    changes = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (4,) * levels,
        "latent_channels": latent_channels,
    }
    return component("AutoencoderKL", changes, seed=seed, gain=gain)


def flow_matching(**configuration: object) -> SchedulerMixin:
    """Make the scheduler that most of the pipelines have."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **configuration})


def assembled(name: str, parts: Call) -> DiffusionPipeline:
    """Make a quiet pipeline by its class's name of those of `parts` that it takes."""
    kind = of_diffusers(name)
    taken = inspect.signature(kind).parameters
    pipeline = kind(**{part: value for part, value in parts.items() if part in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline without text encoders: called, it is made, with the arguments of one call, which hold embeddings."""

    name: str
    transformer: str
    #: The arguments for a number of prompts.
    arguments: Callable[[int], Call]
    vae: str = "AutoencoderKL"
    scheduler: Callable[..., SchedulerMixin] = flow_matching
    scheduling: Configuration = field(default_factory=dict)
    #: The number of text encoders, each with a tokenizer, that are left out.
    encoders: int = 1
    #: Pixels on a side of a token, and of the picture where none is asked for.
    token: int = 16
    side: int = 64
    more_parts: Callable[[], Call] = dict
    #: What the pipeline is told of the picture's (height, width) beside the call.
    fit: Callable[[DiffusionPipeline, int, int], None] | None = None

    def __call__(
        self,
        *,
        size: Size | None = None,
        steps: int = 4,
        batch: int = 1,
        transformer: Configuration | None = None,
        vae: Configuration | None = None,
        **arguments: object,
    ) -> Built:
        """`transformer` and `vae` change a configuration, `arguments` those of the call."""
        height, width = sides(self.side if size is None else size)
        names = [
            f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")[: self.encoders]
        ]
        parts = {
            **dict.fromkeys(names),
            "scheduler": self.scheduler(**self.scheduling),
            "vae": component(self.vae, vae),
            "transformer": component(self.transformer, transformer),
            **self.more_parts(),
        }
        call = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "pt"}
        pipeline = assembled(self.name, parts)
        if self.fit is not None:
            self.fit(pipeline, height, width)
        return pipeline, {**call, **self.arguments(batch), **arguments}


@dataclass(frozen=True)
class TinySibling:
    """A pipeline of another's parts, which takes more: pictures to begin with or to edit."""

    name: str
    base: TinyPipeline | TinySibling
    #: What it takes besides, for a number of pictures of (height, width).
    more: Callable[[int, int, int], Call]
    #: What is different in the other's parts.
    changes: dict[str, Configuration] = field(default_factory=dict)
    #: The class of a ControlNet beside them, which is configured as the transformer is.
    controlnet: str | None = None

    @property
    def token(self) -> int:
        return self.base.token

    @property
    def side(self) -> int:
        return self.base.side

    def __call__(self, *, size: Size | None = None, batch: int = 1, **options: Any) -> Built:
        height, width = sides(self.side if size is None else size)
        arguments = {**self.more(batch, height, width), **self.changes, **options}
        pipeline, call = self.base(size=(height, width), batch=batch, **arguments)
        parts = dict(pipeline.components)
        if self.controlnet is not None:
            kind: Any = of_diffusers(self.controlnet)
            parts["controlnet"] = kind.from_config(dict(pipeline.transformer.config)).eval()
            seed_weights(parts["controlnet"], 5)
        return assembled(self.name, parts), call


@dataclass(frozen=True)
class TinyTransformer:
    """A transformer by itself: called, it is made, with the arguments of one forward."""

    transformer: str
    arguments: Callable[[], Call]
    changes: Configuration = field(default_factory=dict)

    def __call__(self) -> tuple[nn.Module, Call]:
        return component(self.transformer, self.changes), self.arguments()


def sides(size: Size) -> tuple[int, int]:
    """Give the height and the width of a size."""
    return (size, size) if isinstance(size, int) else size


def generate(
    pipeline: DiffusionPipeline, call: Call, *, seeds: tuple[int, ...] | int = 0, **changes: object
) -> torch.Tensor:
    """Call a pipeline from seeds, one for the batch or one an image; give what it made, such as latents."""
    each = [seeds] if isinstance(seeds, int) else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in each]
    generator = generators[0] if isinstance(seeds, int) else generators
    made: torch.Tensor = pipeline(**{**call, **changes}, generator=generator, return_dict=False)[0]
    return made


@contextmanager
def counted_calls(transformer: nn.Module, blocks: Sequence[nn.Module] | None = None) -> Iterator[list[int]]:
    """Count the real calls of `blocks`, in order; without them of every block of the transformer's block lists."""
    if blocks is None:
        blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    counts = [0] * len(blocks)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[index] += 1

        return count

    handles = [block.register_forward_pre_hook(counter(index)) for index, block in enumerate(blocks)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
