"""What judges are taught to see is graded, and what needs no network finds the truth of a render and misses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdit.mini.large.scenes import Scene
from training.large import measures
from training.large.damages import DAMAGES
from training.large.measures import edge_width, fit_ground, palette_distance
from training.large.render import coverage, pack, random_pictures, render

_SIDE = 128


def _drawn(ground: str, seed: int = 0, name: str = "car") -> tuple[Tensor, Tensor, Scene]:
    scene = Scene((name,), ground=ground)
    batch = pack(random_pictures(1, np.random.default_rng(seed), scenes=[scene]))
    return render(batch, _SIDE), coverage(batch, _SIDE), scene


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_grows_with_its_severity_and_is_nothing_at_zero(name: str) -> None:
    images, objects, _ = _drawn("bricks")

    def harm(severity: float) -> float:
        random = torch.Generator().manual_seed(0)
        damaged = DAMAGES[name](images, objects, torch.tensor([severity]), random)
        assert damaged.shape == images.shape
        assert -1e-4 <= damaged.min() <= damaged.max() <= 1 + 1e-4
        return (damaged - images).abs().mean().item()

    harms = [harm(severity) for severity in (0.0, 0.25, 0.5, 1.0)]
    assert harms == sorted(harms)
    assert harms[0] < 1e-5 < harms[1] < 0.8 * harms[3]


def test_objects_cover_what_they_cover() -> None:
    scene = Scene(("ball", "drum"), relation="left of")
    pictures = random_pictures(1, np.random.default_rng(0), scenes=[scene])
    shown = coverage(pack(pictures), _SIDE)[0, 0]
    for place in pictures[0].placements:
        assert shown[int(place.y * _SIDE), int(place.x * _SIDE)] > 0.99
    assert 0.3 * 0.27**2 < shown.mean() < 2 * 0.4**2


def test_of_a_render_the_ground_s_fit_leaves_nothing_and_of_a_damaged_one_it_leaves_the_damage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the whole search takes seconds
    for name, value in {
        "_REPEATS": (0.8, 1.25, 10),
        "_ANGLES": (-0.14, 0.14, 8),
        "_CANDIDATES": 4,
        "_REFINEMENTS": 16,
    }.items():
        monkeypatch.setattr(measures, name, value)
    ground = "wood"
    images, objects, _ = _drawn(ground)
    fit = fit_ground(images[0], ground)
    assert fit.residue < 0.006
    found, true = fit.objects, objects[0, 0] > 0.5
    assert (found & true).sum() > 0.7 * (found | true).sum()
    assert not (fit.far & true).any()
    random = torch.Generator().manual_seed(0)
    seamed = DAMAGES["seams"](images, objects, torch.tensor([0.5]), random)
    assert fit_ground(seamed[0], ground).residue > fit.residue + 0.01


def test_bleached_colors_and_those_of_another_object_are_further_away() -> None:
    images, objects, _ = _drawn("sand", name="frog")
    inside = objects[0, 0] > 0.9
    true = palette_distance(images[0], inside, "frog")
    bleached = DAMAGES["bleaching"](images, objects, torch.tensor([0.5]), torch.Generator())
    assert true < 0.05
    assert palette_distance(bleached[0], inside, "frog") > true + 0.03
    assert palette_distance(images[0], inside, "owl") > true + 0.03
    assert palette_distance(images[0], torch.zeros_like(inside), "frog") == 1.0


def test_softened_edges_are_wider() -> None:
    images, objects, _ = _drawn("checks")
    widths = [
        edge_width(DAMAGES["blur"](images, objects, torch.tensor([severity]), torch.Generator())[0])
        for severity in (0.0, 0.6, 1.0)
    ]
    assert widths == sorted(widths)
    assert widths[0] < 2 < widths[2]
