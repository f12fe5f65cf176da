"""The judges' training: renders, some through the autoencoder, six in ten damaged in one of the known ways."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fastdit.mini.language import Purpose
from fastdit.mini.large.judges import Verdict, build_judge
from fastdit.mini.large.scenes import GROUNDS, LIGHTS, OBJECTS
from training.large import checkpoint
from training.large.damages import DAMAGES
from training.large.render import Picture, coverage, pack, random_pictures, render
from training.large.run import Run, working_dtype

_BATCHES = {256: 12, 512: 4}
_RATE = 1e-3
_DAMAGED_SHARE = 0.6
_DECODED_SHARE = 0.5
#: Pictures as damaged as this aren't asked for what they show.
_READABLE = 0.6
#: How far maps fall off around an object's middle, in cells.
_BLUR = 1.0


def truth(pictures: list[Picture], severities: Tensor, cells: int = 16) -> Verdict:
    """Give what a judge should say: numbers in place of logits, places only where there is one of an object.

    Maps [B, objects, cells, cells] are 1 in the cell of an object's middle and fall off around it.
    """
    counts = torch.zeros(len(pictures), len(OBJECTS), dtype=torch.long)
    places = torch.full((len(pictures), len(OBJECTS), 3), float("nan"))
    covered = torch.full((len(pictures), len(OBJECTS)), float("nan"))
    maps = torch.zeros(len(pictures), len(OBJECTS), cells, cells)
    steps = torch.arange(cells)
    for row, picture in enumerate(pictures):
        for order, place in enumerate(picture.placements):
            index = OBJECTS.index(place.name)
            counts[row, index] += 1
            column, line = (min(cells - 1, max(0, int(at * cells))) for at in (place.x, place.y))
            distance = (steps - column)[None, :].square() + (steps - line)[:, None].square()
            maps[row, index] = torch.maximum(maps[row, index], (-distance / (2 * _BLUR**2)).exp())
            places[row, index] = torch.tensor([place.x, place.y, place.size])
            covered[row, index] = float(picture.scene.relation == "behind" and order == 0)
        several = counts[row] > 1
        places[row, several], covered[row, several] = float("nan"), float("nan")
    lights = [0 if p.light.name is None else 1 + list(LIGHTS).index(p.light.name) for p in pictures]
    return Verdict(
        counts=counts,
        places=places,
        covered=covered,
        ground=torch.tensor([list(GROUNDS).index(picture.ground.name) for picture in pictures]),
        light=torch.tensor(lights),
        damages=severities,
        maps=maps,
        features=torch.zeros(len(pictures), 0),
    )


def losses(said: Verdict, true: Verdict) -> dict[str, Tensor]:
    """Give the losses of everything that a judge says."""
    readable = true.damages.amax(dim=1) < _READABLE
    known = readable[:, None] & ~true.covered.isnan()
    found = {
        "damages": functional.binary_cross_entropy_with_logits(said.damages, true.damages),
        # most objects are absent from most pictures
        "counts": 4 * functional.cross_entropy(said.counts[readable].flatten(0, 1), true.counts[readable].flatten()),
        "ground": functional.cross_entropy(said.ground[readable], true.ground[readable]),
        "light": functional.cross_entropy(said.light[readable], true.light[readable]),
        "places": 4 * functional.smooth_l1_loss(said.places[known], true.places[known], beta=0.05),
        "maps": _focal(said.maps[readable], true.maps[readable]),
        "covered": functional.binary_cross_entropy_with_logits(said.covered[known], true.covered[known]),
    }
    return {name: loss if loss.isfinite() else said.damages.sum() * 0.0 for name, loss in found.items()}


def _focal(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's loss (arXiv 1904.07850) of maps that are almost everywhere empty, over the number of middles.

    What is near a middle counts little, and so does what is said surely and rightly.
    """
    sure = logits.sigmoid()
    middle = heat == 1.0
    there = (1 - sure).square() * functional.logsigmoid(logits)
    empty = (1 - heat).pow(4) * sure.square() * functional.logsigmoid(-logits)
    return -torch.where(middle, there, empty).sum() / middle.sum().clamp(min=1)


def train(purpose: Purpose, directory: Path, device: torch.device, minutes: float, *, cooldown: float = 0.0) -> None:
    """Train a judge for some minutes more, and save its weights in float16."""
    torch.manual_seed(11 if purpose == "search" else 12)
    run = Run(f"judge-{purpose}", directory, minutes, device, cooldown=cooldown)
    checkpoint.unpack(directory)
    vae = AutoencoderTiny.from_pretrained(directory / "vae").float().eval()
    vae = vae.to(device, memory_format=torch.channels_last)
    judge = build_judge(purpose).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_RATE, weight_decay=0.02)
    if (state := run.resume(device)) is not None:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        run.save(judge=judge.state_dict(), optimizer=optimizer.state_dict())
        half = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
        save_file(half, directory / f"judge-{purpose}.safetensors")

    while not run.over:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * run.rate_factor(warmup_steps=200)
        images, true = _batch(purpose, run, vae, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=working_dtype(device) == torch.bfloat16):
            said = judge(images)
        found = losses(said, true)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        run.samples += len(images)
        if run.step % 50 == 0:
            run.log(**{name: value.item() for name, value in found.items()})
        if run.wants_saving:
            save()
    save()


def _batch(purpose: Purpose, run: Run, vae: AutoencoderTiny, device: torch.device) -> tuple[Tensor, Verdict]:
    """Give this step's pictures [B, 3, H, W] in [0, 1] and the truth about them."""
    run.seed()
    # the two judges never see the same pictures
    random = run.random(stream=21 if purpose == "search" else 22)
    pixels = int(random.choice(list(_BATCHES)))
    pictures = random_pictures(_BATCHES[pixels], random)
    batch = pack(pictures, device)
    images = render(batch, pixels)
    decoded = torch.from_numpy(random.random(len(images)) < _DECODED_SHARE).to(device)
    with torch.no_grad():
        if decoded.any():
            dtype = working_dtype(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                given = (images[decoded] * 2 - 1).contiguous(memory_format=torch.channels_last)
                seen = vae.decode(vae.encode(given).latents).sample
            images[decoded] = ((seen.float() + 1) / 2).clamp(0, 1)
        severities = torch.zeros(len(images), len(DAMAGES), device=device)
        objects = coverage(batch, pixels)
        chances = torch.Generator(device).manual_seed(int(random.integers(2**62)))
        for row in range(len(images)):
            if random.random() < _DAMAGED_SHARE:
                which = int(random.integers(len(DAMAGES)))
                severities[row, which] = float(random.uniform(0.05, 1.0))
                damage = list(DAMAGES.values())[which]
                one = slice(row, row + 1)
                images[one] = damage(images[one], objects[one], severities[one, which], chances)
    true = truth(pictures, severities, pixels // 16)
    moved = {name: getattr(true, name).to(device) for name in true.__dataclass_fields__}
    return images, Verdict(**moved)
