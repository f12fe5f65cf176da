"""The large model's judges: what they are asked, and that both can be asked it at every size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdit.mini.large.judges import DAMAGES, AttentiveJudge, ConvolutionalJudge, Verdict, score
from fastdit.mini.large.scenes import GROUNDS, LIGHTS, OBJECTS, Scene, random_scene
from training.large.judging import losses, truth
from training.large.render import Picture, random_picture, random_pictures


def _certain(numbers: Tensor, choices: int) -> Tensor:
    return 30.0 * functional.one_hot(numbers, choices)


def _perfect(pictures: list[Picture], severity: float = 0.0) -> Verdict:
    """What a judge without fault says."""
    severities = torch.zeros(len(pictures), len(DAMAGES))
    severities[:, 0] = severity
    true = truth(pictures, severities)
    return dataclasses.replace(
        true,
        counts=_certain(true.counts, 4),
        places=true.places.nan_to_num(0.5),
        covered=60 * true.covered.nan_to_num(0) - 30,
        ground=_certain(true.ground, len(GROUNDS)),
        light=_certain(true.light, 1 + len(LIGHTS)),
        damages=torch.logit(severities, eps=1e-6),
    )


def test_a_perfect_verdict_scores_one_by_its_own_prompt_and_damage_takes_its_part() -> None:
    random = np.random.default_rng(0)
    scenes = [random_scene(random) for _ in range(120)]
    pictures = [random_picture(scene, random) for scene in scenes]
    assert score(_perfect(pictures), scenes).min() > 0.9
    assert score(_perfect(pictures, 0.5), scenes).max() < 0.51


@pytest.mark.parametrize(
    ("shown", "asked"),
    [
        (Scene(("apple",)), Scene(("banana",))),
        (Scene(("apple",)), Scene(("animal",))),
        (Scene(("apple",), count=2), Scene(("apple",))),
        (Scene(("apple",), count=2), Scene(("apple",), count=3)),
        (Scene(("apple",)), Scene(("apple", "owl"), relation="above")),
        (Scene(("owl", "apple"), relation="above"), Scene(("apple", "owl"), relation="above")),
        (Scene(("owl", "apple"), relation="left of"), Scene(("apple", "owl"), relation="left of")),
        (Scene(("owl", "apple"), relation="behind"), Scene(("apple", "owl"), relation="behind")),
        (Scene(("owl",), place="left"), Scene(("owl",), place="right")),
        (Scene(("owl",), size="small"), Scene(("owl",), size="big")),
        (Scene(("owl",), ground="wood"), Scene(("owl",), ground="sky")),
        (Scene(("owl",), light="night"), Scene(("owl",), light="sunset")),
    ],
)
def test_another_picture_than_the_asked_one_scores_low(shown: Scene, asked: Scene) -> None:
    picture = random_picture(shown, np.random.default_rng(0))
    assert score(_perfect([picture]), [asked]) < 0.35
    assert score(_perfect([picture]), [shown]) > 0.9


def test_a_member_of_a_kind_is_what_was_asked_for() -> None:
    picture = random_picture(Scene(("pizza", "owl"), relation="above"), np.random.default_rng(0))
    for asked in (("pizza", "animal"), ("snack", "owl"), ("snack", "animal")):
        assert score(_perfect([picture]), [Scene(asked, relation="above")]) > 0.9
    assert score(_perfect([picture]), [Scene(("burger", "snack"), relation="above")]) < 0.1


@pytest.mark.parametrize("judge", [ConvolutionalJudge, AttentiveJudge])
def test_a_judge_is_small_reads_every_size_and_learns_of_everything(
    judge: type[ConvolutionalJudge] | type[AttentiveJudge],
) -> None:
    made = judge()
    assert sum(parameter.numel() for parameter in made.parameters()) * 2 < 5e6
    pictures = random_pictures(3, np.random.default_rng(0))
    for pixels in (64, 128):
        said = made(torch.rand(3, 3, pixels, pixels))
        assert said.counts.shape == (3, len(OBJECTS), 4)
        assert 0 <= score(said, [picture.scene for picture in pictures]).min() <= 1
    found = losses(said, truth(pictures, torch.zeros(3, len(DAMAGES)), cells=8))
    torch.stack(list(found.values())).sum().backward()
    assert all(value.isfinite() for value in found.values())
    assert all(parameter.grad is not None for parameter in made.parameters())
