"""The description that a model family gives of its tokens, and the list of described families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from fastdit.layout import TokenLayout


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

    def matches(self, pipeline: Any) -> bool:
        """Whether this description holds for a pipeline (by its class)."""

    def of(self, pipeline: Any) -> Family:
        """Give the description with what it takes from a pipeline's own configuration."""

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Give the image's height and width in pixels for a call's arguments."""

    def grid(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        """Give the rows and columns of image tokens for a size in pixels."""

    def refusal(self, pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
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

    def decode(self, pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
        """Decode latent frames to pixels [B, 3, H, W] in about [-1, 1]; [B, 3 T, H, W] of a video of T pictures."""

    def encode(self, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels of the same shape, in [-1, 1], to latent frames, as the pipeline's own would be scaled."""

    def latents_of(self, arguments: Mapping[str, Any], layout: TokenLayout) -> torch.Tensor:
        """Find the latents of a layout among a forward's arguments, in the shape in which the scheduler gets them."""

    def appended(self, arguments: Mapping[str, Any], layout: TokenLayout) -> int:
        """Count the tokens that follow the layout's in a forward's sequence of image tokens."""

    def place(
        self, arguments: Mapping[str, Any], given: TokenLayout, latents: torch.Tensor, layout: TokenLayout
    ) -> dict[str, Any]:
        """Give a forward's arguments with a layout's latents and positions in place of those of the layout `given`."""

    def velocity(self, output: Any, layout: TokenLayout) -> Any:
        """Give a forward's output with what it says of the layout's tokens alone."""

    def child_overrides(self, transformer: Any, layout: TokenLayout, latents: torch.Tensor) -> dict[str, Any]:
        """Give the children of the structural twin that a layout replaces, by name (none for most layouts).

        `latents` are those of `latents_of`: their batch is the layout's, or several of it in a row (guidance).
        """

    def turn(self, transformer: Any, layout: TokenLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Give what turns queries and keys [B, H, tokens, D] by their places in the layout's frame once more.

        Cosines and sines [1 or B, tokens, D], as `fastdit.models.rotary.turned` takes them. Families that give a
        reason in `one_frame` have none.
        """

    def pipeline_overrides(self) -> tuple[str, ...]:
        """Name the methods whose first argument is latents that may have to be lifted first.

        They are the pipeline's own, or one of a component's: "component.method".
        """


def families() -> tuple[Family, ...]:
    """List the described families."""
    from fastdit.models.flux import (
        BRIA,
        CHROMA,
        FLUX,
        FLUX_FILL,
        LONGCAT_IMAGE,
        OVIS_IMAGE,
    )
    from fastdit.models.flux2 import FLUX2
    from fastdit.models.hidream import HIDREAM
    from fastdit.models.lumina2 import LUMINA2
    from fastdit.models.placed import COGVIEW4, HUNYUAN_IMAGE
    from fastdit.models.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS
    from fastdit.models.sd3 import SD3
    from fastdit.models.whole_frames import (
        AURA_FLOW,
        HUNYUAN_VIDEO,
        PRX,
        SANA,
        WAN,
    )
    from fastdit.models.z_image import Z_IMAGE

    flux = (FLUX, FLUX_FILL, CHROMA, OVIS_IMAGE, LONGCAT_IMAGE, BRIA, FLUX2)
    qwen = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS)
    frames = (SD3, HUNYUAN_IMAGE, COGVIEW4, LUMINA2, Z_IMAGE, HIDREAM)
    whole = (AURA_FLOW, SANA, PRX, WAN, HUNYUAN_VIDEO)
    return (*flux, *qwen, *frames, *whole)


def family_of(pipeline: Any) -> Family | None:
    """Find the description of a pipeline's family, or None."""
    return next((family.of(pipeline) for family in families() if family.matches(pipeline)), None)


#: Arguments by which pipelines take pictures as prompts, whose features are made for one token layout.
PICTURE_ADAPTERS = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
)


def refused_arguments(arguments: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Say which of `names` a call gives although no mixed layout can honour it; None if it gives none."""
    given = [name for name in names if arguments.get(name) is not None]
    if not given:
        return None
    return f"{', '.join(given)} can't follow a token layout that changes; leave it out or drop the schedule"


def decoded(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Decode latent frames with an autoencoder whose latents are scaled and, in most, shifted."""
    scaled = frames / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    pixels: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return pixels


def encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels to latent frames: the undoing of `decoded`. Distributions give their mode, so nothing is drawn."""
    made = vae.encode(pixels.to(vae.dtype))
    if hasattr(made, "latent_dist"):
        latents: torch.Tensor = made.latent_dist.mode()
    else:
        latents = made.latents if hasattr(made, "latents") else made.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: torch.Tensor = (latents - shift) * vae.config.scaling_factor
    return scaled
