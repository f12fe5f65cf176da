"""Measures of a picture that need no network, since what a picture is made of is known.

- `fit_ground`: the best fit of a named ground's known form. What it leaves far from objects is the ground's residue;
  where it leaves much is where objects are.
- `palette_distance`: how far the colours of an object are from its true ones under any coloured light.
- `edge_width`: how many pixels a picture's strongest edges take.

No search may see these; tables report them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastdit.mini.large.scenes import OBJECTS
from training.large import sprites
from training.large.grounds import FORMS, texture_coordinates

_COARSE = 64
_FINE = 128
_REPEATS = (0.78, 1.27, 22)
_ANGLES = (-0.15, 0.15, 15)
_CANDIDATES = 8
_REFINEMENTS = 60
#: The share of pixels that a coarse fit trusts: objects and their shadows are the rest.
_TRUSTED = 0.6
_CELLS = 32
_OBJECT_RESIDUE = 0.09
_FAR = 0.06


@dataclass(frozen=True)
class GroundFit:
    """A fitted ground: its parameters, the picture it would be [3, H, W], and what is left of the real one."""

    name: str
    repeats: float
    angle: float
    shift: tuple[float, float]
    ground: Tensor
    residue: float
    #: Where objects are and where it is far from any, [H, W].
    objects: Tensor
    far: Tensor


def fit_ground(image: Tensor, name: str) -> GroundFit:
    """Fit a ground to a picture [3, H, W] in [0, 1]: coarsely over all parameters, then from the best of them on."""
    small = functional.interpolate(image[None], size=(_COARSE, _COARSE), mode="area")[0]
    best = _refine(small, name, _search(small, name), _REFINEMENTS)
    medium = functional.interpolate(image[None], size=(_FINE, _FINE), mode="area")[0]
    best = _refine(medium, name, best[: _CANDIDATES // 4], _REFINEMENTS)
    best = _refine(image, name, best[:1], _REFINEMENTS // 2)
    basis = _basis(name, best, image.shape[-1])[0]
    trust = torch.ones(image.shape[1:], device=image.device)
    for _ in range(4):
        ground = _solve(basis[None], image, trust[None])[0]
        error = (image - ground).abs().amax(dim=0)
        trust = _trusted(error)
    objects = _opened((error > _OBJECT_RESIDUE).float())
    far = 1 - _grown(objects, _FAR)
    if far.mean() > 0.02:
        ground = _solve(basis[None], image, far[None])[0]
        residue = ((image - ground).square().mean(dim=0) * far).sum() / far.sum()
    else:
        residue = (image - ground).square().mean()
    repeats, angle, *shift = best[0].tolist()
    parameters = (repeats, angle, (shift[0] % 1.0, shift[1] % 1.0))
    return GroundFit(name, *parameters, ground, residue.sqrt().item(), objects.bool(), far.bool())


def palette_distance(image: Tensor, objects: Tensor, name: str) -> float:
    """How far the colours of a picture's objects [H, W] are from those of an object, each channel's light left free.

    The channels' sorted values are compared, so nothing has to be in its place. Bleaching and holes are far from any
    light; a tint is none.
    """
    if objects.sum() < 16:
        return 1.0
    sprite = sprites.levels(image.device)[sprites.LEVELS[1]][OBJECTS.index(name)]
    true = sprite[:3, sprite[3] > 0.98]
    shown = image[:, objects]
    quantiles = torch.linspace(0.02, 0.98, 49, device=image.device)
    wanted, found = (torch.quantile(colors, quantiles, dim=1) for colors in (true, shown))
    light = (wanted * found).sum(dim=0) / wanted.square().sum(dim=0)
    # in units of the light, so that a picture at night isn't nearer to everything
    return ((found - light * wanted).square().mean(dim=0).sqrt() / light.clamp(min=0.05)).mean().item()


def edge_width(image: Tensor) -> float:
    """How many pixels the strongest edges of a picture [3, H, W] take from their dark to their bright side."""
    gray = image.mean(dim=0)[None, None]
    reach = max(1, round(0.012 * image.shape[-1]))
    window = 2 * reach + 1
    highest = functional.max_pool2d(gray, window, stride=1, padding=reach)
    contrast = highest + functional.max_pool2d(-gray, window, stride=1, padding=reach)
    across = functional.pad(gray, (1, 1, 0, 0), mode="replicate").diff(dim=-1)
    down = functional.pad(gray, (0, 0, 1, 1), mode="replicate").diff(dim=-2)
    slope = torch.maximum(
        torch.maximum(across[..., 1:].abs(), across[..., :-1].abs()),
        torch.maximum(down[..., 1:, :].abs(), down[..., :-1, :].abs()),
    )
    steepest = functional.max_pool2d(slope, 3, stride=1, padding=1)
    strong = (slope == steepest) & (contrast > torch.quantile(contrast, 0.95)) & (contrast > 0.05)
    return (contrast[strong] / slope[strong].clamp(min=1e-4)).median().item() if strong.any() else math.inf


def _search(image: Tensor, name: str) -> Tensor:
    """Every scale and turn of a grid, each with its best shift: parameters [K, 4], the best first.

    In texture coordinates a shift moves the ground around its one period. So the picture is folded into one period, and
    its correlation with the form at all shifts is one product of Fourier transforms.
    """
    side = image.shape[-1]
    device = image.device
    pixels = image - image.mean(dim=(1, 2), keepdim=True)
    # the direction of color in which the picture varies most is the one between the ground's two colors
    _, vectors = torch.linalg.eigh(pixels.flatten(1) @ pixels.flatten(1).mT)
    gray = (vectors[:, -1, None, None] * pixels).sum(dim=0)
    gray = gray - _plane(gray)
    steps = (torch.arange(side, device=device) + 0.5) / side
    period = (torch.arange(side, device=device) + 0.5) / side
    u, v = (axis[None] for axis in torch.meshgrid(period, period, indexing="xy"))
    angles = torch.zeros(1) if name == "sky" else torch.linspace(*_ANGLES)
    found = []
    for repeats in torch.linspace(*_REPEATS):
        footprint = (repeats / side).reshape(1, 1, 1).to(device)
        form = FORMS[name](u, v, footprint)[0]
        form = form - form.mean()
        transform = torch.fft.rfft2(form)
        energy = torch.fft.rfft2(form.square())
        for angle in angles:
            x, y = steps[None, None, :].expand(1, side, side), steps[None, :, None].expand(1, side, side)
            one = (repeats[None].to(device), angle[None].to(device), torch.zeros(1, 2, device=device))
            column, row = (torch.remainder(axis[0] * side, side).long() for axis in texture_coordinates(x, y, *one))
            place = (row * side + column).flatten()
            folded = torch.zeros(side * side, device=device).index_add_(0, place, gray.flatten()).view(side, side)
            count = torch.zeros(side * side, device=device).index_add_(0, place, torch.ones_like(gray).flatten())
            product = torch.fft.irfft2(torch.fft.rfft2(folded).conj() * transform, s=(side, side))
            seen = torch.fft.irfft2(torch.fft.rfft2(count.view(side, side)).conj() * energy, s=(side, side))
            score = product.abs() / seen.clamp(min=1e-3).sqrt()
            value, where = score.flatten().max(dim=0)
            shift = (float(where % side) / side, float(where // side) / side)
            found.append((value.item(), float(repeats), float(angle), *shift))
    found.sort(reverse=True)
    return torch.tensor(found[:_CANDIDATES], device=device)[:, 1:]


def _refine(image: Tensor, name: str, start: Tensor, steps: int) -> Tensor:
    """Follow the gradient of the trimmed residue from every candidate [K, 4]; the best come first."""
    parameters = start.clone().requires_grad_()
    side = image.shape[-1]
    scale = torch.tensor([0.004, 0.0 if name == "sky" else 0.004, 0.004, 0.004], device=image.device) * _FINE / side
    moment, square = torch.zeros_like(start), torch.zeros_like(start)
    best, kept = torch.full((len(start),), math.inf, device=image.device), start.clone()
    for step in range(steps):
        with torch.enable_grad():
            basis = _basis(name, parameters, side)
            with torch.no_grad():
                trust = torch.ones(len(start), side, side, device=image.device)
                for _ in range(2):
                    trust = _trusted((image - _solve(basis, image, trust)).abs().amax(dim=1))
            error = ((image - _solve(basis, image, trust)).square().mean(dim=1) * trust).mean(dim=(1, 2))
            (gradient,) = torch.autograd.grad(error.sum(), parameters)
        with torch.no_grad():
            better = error < best
            best, kept = torch.where(better, error, best), torch.where(better[:, None], parameters, kept)
            moment = moment.lerp(gradient, 0.3)
            square = square.lerp(gradient.square(), 0.1)
            corrected = moment / (1 - 0.7 ** (step + 1)) / ((square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-12)
            parameters -= scale * (1 - step / steps) * corrected
    return kept[best.argsort()]


def _basis(name: str, parameters: Tensor, side: int) -> Tensor:
    """What a lit ground is a combination of, [K, 6, side, side]: 1, x, y, h, hx and hy."""
    steps = (torch.arange(side, device=parameters.device) + 0.5) / side
    x, y = (axis.expand(len(parameters), side, side) for axis in (steps[None, None, :], steps[None, :, None]))
    u, v = texture_coordinates(x, y, parameters[:, 0], parameters[:, 1], parameters[:, 2:])
    height = FORMS[name](u, v, (parameters[:, 0].detach() / side)[:, None, None])
    x, y = x - 0.5, y - 0.5
    return torch.stack([torch.ones_like(x), x, y, height, height * x, height * y], dim=1)


def _solve(basis: Tensor, image: Tensor, weights: Tensor) -> Tensor:
    """The combination of each basis that is nearest to the picture, by weights [K, H, W]: [K, 3, H, W]."""
    flat, target = basis.flatten(2), image.flatten(1)
    weighted = flat * weights.flatten(1)[:, None]
    gram = weighted @ flat.mT / target.shape[1] + 1e-7 * torch.eye(basis.shape[1], device=basis.device)
    factors = torch.linalg.solve(gram, weighted @ target.mT / target.shape[1])
    return (factors.mT @ flat).unflatten(2, basis.shape[2:])


def _trusted(error: Tensor) -> Tensor:
    """1 where a picture's error is among its smallest, [.., H, W].

    It is averaged over the size of an object first. Else a ground's own edges, slightly misplaced, wouldn't be trusted,
    and nothing would move them.
    """
    cells = functional.adaptive_avg_pool2d(error.reshape(-1, 1, *error.shape[-2:]), _CELLS)
    around = functional.avg_pool2d(cells, 5, stride=1, padding=2, count_include_pad=False)
    limit = around.flatten(1).kthvalue(int(_TRUSTED * _CELLS**2), dim=1).values
    trusted = (around <= limit[:, None, None, None]).float()
    return functional.interpolate(trusted, size=error.shape[-2:], mode="nearest").reshape(error.shape)


def _plane(gray: Tensor) -> Tensor:
    steps = torch.linspace(-0.5, 0.5, gray.shape[-1], device=gray.device)
    across, down = (gray * steps).mean() / steps.square().mean(), (gray * steps[:, None]).mean() / steps.square().mean()
    return gray.mean() + across * steps + down * steps[:, None]


def _opened(mask: Tensor) -> Tensor:
    """A mask without its specks, and without holes of their size."""
    size = max(3, round(0.015 * mask.shape[-1]) | 1)
    mean = functional.avg_pool2d(mask[None, None], size, stride=1, padding=size // 2)
    kept = (mean > 0.6).float()
    size = 2 * size + 1
    return (functional.max_pool2d(kept, size, stride=1, padding=size // 2)[0, 0] * (mean[0, 0] > 0.3)).float()


def _grown(mask: Tensor, by: float) -> Tensor:
    size = 2 * round(by * mask.shape[-1]) + 1
    return functional.max_pool2d(mask[None, None], size, stride=1, padding=size // 2)[0, 0]
