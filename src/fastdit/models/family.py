"""The description that a model family gives of its tokens, and the list of described families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

from fastdit.errors import InvalidConfig

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import nn

    from fastdit.layout import TokenLayout

#: What there is to describe, as diffusers has it, whose import waits until it is needed.
Pipeline: TypeAlias = "DiffusionPipeline"
Transformer: TypeAlias = "ModelMixin"
Autoencoder: TypeAlias = "ModelMixin"
#: What a call of a pipeline, or a forward, was given, by name.
Arguments: TypeAlias = Mapping[str, Any]
#: The arguments of a forward, with a layout's in place.
Placed: TypeAlias = dict[str, Any]
#: Children of a structural twin, by name.
Children: TypeAlias = "dict[str, nn.Module]"
#: Cosines and sines of places, [1 or B, tokens, D] each.
Tables: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
Output = TypeVar("Output")


class Family(Protocol):
    """How a family of pipelines lays its image tokens out.

    A schedule works on tokens [B, N, C]; through the pipeline's own loop its latents travel in the pipeline's shape,
    which `tokens` and `latents` translate.
    """

    #: Whether a stage may mix resolutions and set its tokens' places; whole frames of either size are always possible.
    mixes: ClassVar[bool]
    #: Whether the tokens lie in one plane; where they don't, a layout's token stands for its place in every plane.
    one_plane: ClassVar[bool]

    #: Why a query can't see keys in a frame of its own; None where it can (see `turn`).
    one_frame: ClassVar[str | None]

    @property
    def name(self) -> str:
        """What the family is called; published settings belong to it."""

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The names of the pipeline classes that the description holds for."""

    def matches(self, pipeline: Pipeline) -> bool:
        """Whether this description holds for a pipeline (by its class)."""

    def of(self, pipeline: Pipeline) -> Family:
        """Give the description with what it takes from a pipeline's own configuration."""

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        """Give the image's height and width in pixels for a call's arguments."""

    def grid(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int]:
        """Give the rows and columns of image tokens for a size in pixels."""

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        """Say which argument of a call a mixed-resolution schedule can't honour, and what to do; None if none is."""

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn a stage's latents, in the pipeline's shape, into its tokens [B, N, C]."""

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Undo `tokens`: give a stage's tokens the shape in which they travel through the pipeline's loop."""

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Turn tokens [B, rows * columns, C] into a latent frame [B, channels, height, width]."""

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        """Undo `unpack`."""

    def halved(self, frames: torch.Tensor) -> torch.Tensor:
        """Bring frames of a picture, or of its mask, to half their height and width."""

    def decode(self, pipeline: Pipeline, frames: torch.Tensor) -> torch.Tensor:
        """Decode latent frames to pixels [B, 3, H, W] in about [-1, 1]; [B, 3 T, H, W] of a video of T pictures."""

    def encode(self, pipeline: Pipeline, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels of the same shape, in [-1, 1], to latent frames, as the pipeline's own would be scaled."""

    def latents_of(self, arguments: Arguments, layout: TokenLayout) -> torch.Tensor:
        """Find the latents of a layout among a forward's arguments, in the shape in which the scheduler gets them."""

    def appended(self, arguments: Arguments, layout: TokenLayout) -> int:
        """Count the tokens that follow the layout's in a forward's sequence of image tokens."""

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        """Give a forward's arguments with a layout's latents and positions in place of those of the layout `given`."""

    def velocity(self, output: Output, layout: TokenLayout) -> Output:
        """Give a forward's output with what it says of the layout's tokens alone."""

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        """Give the children of the structural twin that a layout replaces, by name (none for most layouts).

        `latents` are those of `latents_of`: their batch is the layout's, or several of it in a row (guidance).
        """

    def turn(self, transformer: Transformer, layout: TokenLayout, device: torch.device) -> Tables:
        """Give what turns queries and keys [B, H, tokens, D] by their places in the layout's frame once more.

        Cosines and sines [1 or B, tokens, D], as `fastdit.models.rotary.turned` takes them. Families that give a
        reason in `one_frame` have none.
        """

    def pipeline_overrides(self) -> tuple[str, ...]:
        """Name the methods whose first argument is latents that may have to be lifted first.

        They are the pipeline's own, or one of a component's: "component.method".
        """


#: The library's own: modules of this package, each with its `FAMILIES`.
_OWN = ("flux", "flux2", "qwen_image", "sd3", "placed", "lumina2", "z_image", "hidream", "whole_frames", "ernie_image")

_REGISTERED: list[Family] = []


def register_family(family: Family) -> Family:
    """Describe a family of pipelines for this process; an installed package names it as an entry point instead.

    Raises `InvalidConfig` for a class of pipelines that has a description already.
    """
    for known in families():
        if taken := sorted(set(known.pipelines) & set(family.pipelines)):
            raise InvalidConfig(
                f"{', '.join(taken)} belong to the family {known.name}; leave them out of {family.name}'s pipelines"
            )
    _REGISTERED.append(family)
    return family


def families() -> tuple[Family, ...]:
    """List the described families: the library's, those registered, and those of installed packages."""
    return tuple(_described())


def family_of(pipeline: Pipeline) -> Family | None:
    """Find the description of a pipeline's family, or None."""
    return next((family.of(pipeline) for family in _described() if family.matches(pipeline)), None)


def _described() -> Iterator[Family]:
    for name in _OWN:
        yield from import_module(f"fastdit.models.{name}").FAMILIES
    yield from _REGISTERED
    yield from _installed()


@lru_cache(maxsize=1)
def _installed() -> tuple[Family, ...]:
    """Load the families that installed packages name as entry points of `fastdit.families`: objects, or what makes one.

    They come last, so that none stands in the way of a pipeline that another describes.
    """
    found = []
    for entry in entry_points(group="fastdit.families"):
        try:
            given = entry.load()
        except (ImportError, AttributeError) as error:
            raise InvalidConfig(
                f"the family {entry.name!r} belongs to {entry.value}, which can't be imported: {error}"
            ) from error
        found.append(given() if isinstance(given, type) or not hasattr(given, "matches") else given)
    return tuple(found)


#: Arguments by which pipelines take pictures as prompts, whose features are made for one token layout.
PICTURE_ADAPTERS = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
)


def refused_arguments(arguments: Arguments, names: Sequence[str]) -> str | None:
    """Say which of `names` a call gives although no mixed layout can honour it; None if it gives none."""
    given = [name for name in names if arguments.get(name) is not None]
    if not given:
        return None
    return f"{', '.join(given)} can't follow a token layout that changes; leave it out or drop the schedule"
