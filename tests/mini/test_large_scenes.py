"""The large model's language and renderer: prompts can be read back, and pictures show what their truth says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastdit.mini.large import scenes
from fastdit.mini.large.scenes import Scene, parse, random_scene, vocabulary
from training.large.grounds import FORMS
from training.large.render import Picture, light_of, pack, random_picture, random_pictures, render


def _pictures(count: int, seed: int = 0) -> list[Picture]:
    return random_pictures(count, np.random.default_rng(seed))


def test_scenes_survive_being_said_and_read_and_one_in_eight_is_kept_for_evaluation() -> None:
    random, words = np.random.default_rng(0), set(vocabulary())
    for held_out in (False, True):
        for _ in range(200):
            scene = random_scene(random, held_out=held_out)
            assert parse(scene.prompt()) == scene
            assert scene.held_out == held_out
            assert set(scene.prompt().split()) <= words
    share = np.mean([random_scene_of(random).held_out for _ in range(1500)])
    assert 0.09 < share < 0.16


def random_scene_of(random: np.random.Generator) -> Scene:
    every = (scenes.NOUNS, (None, *scenes.GROUNDS), (None, *scenes.LIGHTS))
    first, second = random.choice(scenes.NOUNS, 2, replace=False)
    ground, light = (choices[random.integers(len(choices))] for choices in every[1:])
    return Scene((str(first), str(second)), relation="above", ground=ground, light=light)


@pytest.mark.parametrize("prompt", ["", "an unicorn", "a apple", "three apple", "an apple left of an apple", "apples"])
def test_words_of_another_language_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError):
        parse(prompt)


def test_what_a_prompt_says_is_in_its_picture() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        picture = random_picture(scene := random_scene(random), random)
        names = [placement.name for placement in picture.placements]
        assert len(names) == scene.count * len(scene.nouns)
        for noun, name in zip(scene.nouns * scene.count, names, strict=True):
            assert name == noun or name in scenes.KINDS[noun]
        assert scene.ground in (None, picture.ground.name)
        assert scene.light in (None, picture.light.name)
        first, last = picture.placements[0], picture.placements[-1]
        middle = (first.size + last.size) / 2
        if scene.relation == "left of":
            assert last.x - first.x > 0.9 * middle > abs(last.y - first.y)
        if scene.relation == "above":
            assert last.y - first.y > 0.9 * middle > abs(last.x - first.x)
        if scene.relation == "behind":
            assert len(set(names)) == 2
            assert max(abs(last.x - first.x), abs(last.y - first.y)) < 0.65 * middle
        if scene.place:
            lower, upper = {"left": (0, 0.5), "top": (0, 0.5)}.get(scene.place, (0.5, 1))
            assert lower < (first.x if scene.place in ("left", "right") else first.y) < upper


def test_a_window_is_a_part_of_the_whole_picture() -> None:
    batch = pack(_pictures(4))
    windows = torch.tensor([0.25, 0.5, 0.25]).expand(4, 3)
    torch.testing.assert_close(render(batch, 32, windows), render(batch, 128)[:, :, 64:96, 32:64], atol=2e-4, rtol=0)


def test_a_picture_of_half_the_size_is_the_same_picture() -> None:
    batch = pack(_pictures(8))
    smaller = functional.avg_pool2d(render(batch, 256), 2)
    assert (smaller - render(batch, 128)).square().mean().sqrt() < 0.035


def test_far_from_objects_there_is_the_ground_and_nothing_else() -> None:
    pictures = _pictures(len(FORMS) * 4, seed=2)
    assert {picture.ground.name for picture in pictures} == set(FORMS)
    batch, pixels = pack(pictures), 64
    steps = (torch.arange(pixels) + 0.5) / pixels
    x, y = steps.expand(batch.count, -1), steps.expand(batch.count, -1)
    bare = pack([Picture(p.scene, (), p.ground, p.light) for p in pictures])
    difference = (render(batch, pixels) - render(bare, pixels)).abs().amax(dim=1)
    for row, picture in enumerate(pictures):
        far = torch.ones(pixels, pixels, dtype=torch.bool)
        for place in picture.placements:
            inside = ((x[row] - place.x).abs()[None] < 0.9 * place.size) & (
                (y[row] - place.y).abs()[:, None] < 0.9 * place.size
            )
            far &= ~inside
            center = (int(place.y * pixels), int(place.x * pixels))
            assert place.name == "doughnut" or difference[row][center] > 0.005
        assert not difference[row][far].any()
    assert (light_of(batch, x, y) > 0).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_ground_repeats_and_keeps_within_its_two_colors(name: str) -> None:
    u, v = torch.rand(1, 64, 64), torch.rand(1, 64, 64)
    pixel = torch.full((1, 1, 1), 1 / 256)
    height = FORMS[name](u, v, pixel)
    assert -0.15 < height.min() < height.max() < 1.15
    assert height.std() > 0.08
    torch.testing.assert_close(FORMS[name](u + 1, v - 1, pixel), height, atol=2e-3, rtol=0)
