"""Pictures of the transformer as it is now, by an ordinary FluxPipeline, as one sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from fastdit.mini.large.scenes import held_out
from training.large import checkpoint, text
from training.large.transformer import build, phase_of


def pipeline(directory: Path, device: torch.device) -> tuple[FluxPipeline, int]:
    """Give the pipeline with the averaged weights, the working directory's or the published, and the samples seen."""
    checkpoint.unpack(directory)
    transformer = build()
    path = directory / "transformer.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        transformer.load_state_dict(state["average"])
        samples = state["samples"]
    else:
        published = checkpoint.transformer()
        if published is None:
            raise FileNotFoundError(f"there is no transformer in {directory}, and none is published")
        transformer.load_state_dict(published.average)
        samples = int(published.numbers["samples"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler"),
        vae=AutoencoderTiny.from_pretrained(directory / "vae").float().eval(),
        text_encoder=CLIPTextModel.from_pretrained(directory / "text_encoder").float().eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(directory / "text_encoder_2").float().eval(),
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made.to(device), samples


def sheet(
    directory: Path,
    device: torch.device,
    *,
    pixels: int,
    count: int,
    steps: int,
    guidance: float,
    prompts: list[str] | None = None,
) -> Path:
    """Write a sheet of pictures of held-out prompts (or of the given ones) and give its path."""
    made, samples = pipeline(directory, device)
    words = prompts or held_out(count)
    # until guidance is learned as an input, a second prediction guides
    learned = phase_of(samples).guided
    settings = {"guidance_scale": guidance} if learned else {"true_cfg_scale": guidance, "negative_prompt": ""}
    pictures = []
    for index, prompt in enumerate(words):
        pictures += made(
            prompt,
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            max_sequence_length=text.LENGTH,
            generator=torch.Generator().manual_seed(index),
            **({"guidance_scale": 1.0} | settings),
        ).images
    columns = min(len(pictures), max(1, 1536 // pixels))
    whole = Image.new("RGB", (columns * pixels, -(-len(pictures) // columns) * pixels))
    draw = ImageDraw.Draw(whole)
    for index, (picture, prompt) in enumerate(zip(pictures, words, strict=True)):
        corner = (index % columns * pixels, index // columns * pixels)
        whole.paste(picture, corner)
        place = (corner[0] + 3, corner[1] + 2)
        draw.text(place, prompt, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    path = directory / f"samples-{samples:07d}-{pixels}.png"
    whole.save(path)
    return path
