"""Where a pipeline comes from: a folder, a hub's name, or an embedded one, and how it is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastdit.config import Config, Range
from fastdit.errors import InvalidConfig
from fastdit.mini import Architecture, load_mini

#: The embedded pipelines by the names that commands know.
EMBEDDED: dict[str, Architecture] = {
    "mini": "flux",
    "mini:flux": "flux",
    "mini:flux-512": "flux-512",
    "mini:sd3": "sd3",
}
_SIDE = 16  # pixels of a token of the embedded pipelines


@dataclass(frozen=True)
class Source(Config):
    """A pipeline by name, and what its users set up beside.

    Args:
        name: "mini" or "mini:sd3" for an embedded pipeline, "random:flux-dev@0.1" for a published
            one's architecture with random weights, here at a tenth of its parameters, a folder that `save_pretrained`
            wrote, or a hub's name.
        variant: the weights' variant, such as "fp16".
        dtype: "float32", "bfloat16" or "float16"; the pipeline's own if left out.
        device: "cuda", "cuda:1", "cpu"; a GPU if there is one.
        lora: weights for `load_lora_weights`.
        offload: "model" or "sequential" for diffusers' offloading of that name.

    Raises:
        InvalidConfig: for a name that can be no pipeline's, and a folder without one.

    >>> Source("mini").embedded
    True
    """

    name: Annotated[str, Range(at_least=1)]
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    lora: str | None = None
    offload: Literal["model", "sequential"] | None = None

    def check_values(self) -> None:
        folder = Path(self.name)
        if self.name.startswith("mini"):
            if not self.embedded:
                raise InvalidConfig(f"the embedded pipelines are {', '.join(EMBEDDED)}, got {self.name!r}")
        elif self.name.startswith("random:"):
            from fastdit.bench.random_pipeline import parsed

            parsed(self.name)
        elif folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise InvalidConfig(f"{self.name} holds no pipeline: it has no model_index.json")
        elif self.name.count("/") != 1 or self.name.startswith((".", "/", "~")):
            raise InvalidConfig(f"{self.name!r} is neither a folder that exists, nor mini, nor a hub's owner/name")

    @property
    def architecture(self) -> Architecture | None:
        """Which of the embedded pipelines it is, if any."""
        return EMBEDDED.get(self.name)

    @property
    def embedded(self) -> bool:
        """Whether the pipeline is one that comes with fastdit."""
        return self.architecture is not None

    @property
    def token_pixels(self) -> int | None:
        """Pixels along a token's side where that is known before anything is loaded."""
        return _SIDE if self.embedded or self.name.startswith("random:") else None

    def load(self) -> Any:
        """Load the pipeline and set it up, its progress bar off."""
        import torch

        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        pipeline: Any
        if self.architecture is not None:
            pipeline = load_mini(self.architecture, torch_dtype=dtype)
        elif self.name.startswith("random:"):
            from fastdit.bench.random_pipeline import load_random

            pipeline = load_random(self.name, dtype)
        else:
            from diffusers import DiffusionPipeline

            options = {} if dtype is None else {"torch_dtype": dtype}
            pipeline = DiffusionPipeline.from_pretrained(self.name, variant=self.variant, **options)
        if self.lora is not None:
            pipeline.load_lora_weights(self.lora)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.offload is None:
            pipeline.to(device)
        else:
            getattr(pipeline, f"enable_{self.offload}_cpu_offload")(device=device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
