"""The common loop on a tiny random FLUX: every configuration sees the same noise, and the record tells the truth."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from PIL.Image import Image

from fastdit import RALU, FirstBlockCache, Stack
from fastdit.measure.experiment import Configuration, Experiment, plain
from fastdit.measure.results import Results
from measurements import from_json
from peers import Peer
from synthetic import random_call, random_flux

Measured = tuple[Results, dict[str, list[Image]], Path]

PROMPTS = ("one", "two", "three", "four")
CONFIGURATIONS = (
    plain(8),
    plain(3),
    Configuration("first block", Stack([FirstBlockCache(0.9)]), {"num_inference_steps": 8}),
    Configuration("RALU", Stack([RALU.paper("4x", fidelity="exact")]), {"num_inference_steps": 4}),
)


class FixedJudge:
    """Likes the second half of the prompts, whatever it sees."""

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([float(PROMPTS.index(prompt) >= 2) for prompt in prompts])


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    pipeline = random_flux()

    def encode(prompts: Sequence[str]) -> dict[str, Any]:
        calls = [random_call(pipeline, image_tokens_per_side=4, seed=PROMPTS.index(prompt)) for prompt in prompts]
        names = ("prompt_embeds", "pooled_prompt_embeds")
        return calls[0] | {name: torch.cat([call[name] for call in calls]) for name in names}

    return Experiment(pipeline, PROMPTS, batch=2, encode=encode, judge=FixedJudge())


@pytest.fixture(scope="module")
def measured(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("measured")
    results, images = experiment.run(CONFIGURATIONS, title="test", baseline="8 steps", directory=directory)
    return results, images, directory


def test_every_configuration_makes_every_picture_in_paired_rounds(measured: Measured) -> None:
    results, images, directory = measured
    assert {len(pictures) for pictures in images.values()} == {len(PROMPTS)}
    assert {len(entry.seconds) for entry in results.configurations} == {len(PROMPTS) // 2}
    assert all((directory / name).exists() for entry in results.configurations for name in entry.images)


def test_pixels_are_compared_only_where_the_noise_is_the_same(measured: Measured) -> None:
    compared = [entry.name for entry in measured[0].configurations if "psnr" in entry.metrics]
    assert compared == ["8 steps", "3 steps", "first block"]


def test_flops_follow_the_steps_of_plain_runs_and_fall_under_stacks(measured: Measured) -> None:
    results = measured[0]
    assert results.flops_ratio("3 steps") == pytest.approx(8 / 3)
    assert results.flops_ratio("RALU") > 2
    assert results.flops_ratio("first block") > 1


def test_records_tell_stages_and_scores_follow_their_prompts(measured: Measured) -> None:
    results = measured[0]
    assert {step["stage"] for step in results["RALU"].records[0]["steps"]} == {0, 1, 2}
    assert results["8 steps"].metrics["judge"].samples == (0.0, 0.0, 1.0, 1.0)
    assert from_json(results.to_json()) == results


@pytest.mark.parametrize(("calls", "rounds"), [(5, 1), (2, 0)])
def test_an_interrupt_keeps_the_whole_rounds_that_were_measured(
    calls: int, rounds: int, experiment: Experiment, tmp_path: Path
) -> None:
    told: list[int] = []
    kept: list[Results] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "measuring" and done == calls:
            raise KeyboardInterrupt
        told.append(done)

    interrupted = dataclasses.replace(experiment, progress=interrupt)
    if rounds == 0:
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(CONFIGURATIONS[:3], title="test", baseline="8 steps")
        return
    results, images = interrupted.run(
        CONFIGURATIONS[:3], title="test", baseline="8 steps", directory=tmp_path, keep=kept.append
    )
    assert results.settings["interrupted"] == "after 1 of 2 rounds"
    assert kept[-1] is results and len(kept) == 2
    assert results.prompts == PROMPTS[:2] and {len(pictures) for pictures in images.values()} == {2}
    for entry in results.configurations:
        assert len(entry.seconds) == 1 and len(entry.metrics["sharpness"].samples) == 2 == len(entry.images)


@pytest.mark.parametrize(("seconds", "rounds"), [(-1.0, 2), (3600.0, 4)])
def test_when_the_time_is_up_no_round_begins_but_for_the_fewest(
    seconds: float, rounds: int, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdit.measure.experiment.FEWEST", 2)
    said: list[tuple[str, int, int]] = []
    short = dataclasses.replace(experiment, batch=1, progress=lambda *told: said.append(told))
    results, images = short.run([plain(2), plain(1)], title="t", baseline="2 steps", until=time.monotonic() + seconds)
    assert len(results.prompts) == rounds == len(images["1 steps"])
    assert said[-1] == ("measuring", 2 * rounds, 2 * rounds)
    assert results.settings.get("shortened") == ("after 2 of 4 rounds" if rounds == 2 else None)
    assert "interrupted" not in results.settings


def test_the_results_so_far_are_given_after_every_round(experiment: Experiment) -> None:
    kept: list[Results] = []
    results, _ = experiment.run([plain(2), plain(1)], title="test", baseline="2 steps", keep=kept.append)
    assert [len(one.prompts) for one in kept] == [2, 4]
    assert kept[-1] == results and "interrupted" not in results.settings
    assert kept[0]["1 steps"].metrics["sharpness"].samples == results["1 steps"].metrics["sharpness"].samples[:2]


def test_a_round_repeats_its_pictures(experiment: Experiment) -> None:
    first, second = (experiment.task(plain(2))(1) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_a_race_tells_times_and_a_rival_is_found(experiment: Experiment) -> None:
    slow, fast = plain(12), plain(2)
    seconds = experiment.race([slow, fast], rounds=1)
    assert 0 < seconds[fast.name] < seconds[slow.name]
    assert 6 <= experiment.rival(slow, rounds=1) <= 24


def test_a_pipeline_of_its_own_is_measured_like_the_rest_and_never_taken_for_plain(experiment: Experiment) -> None:
    same, cached = random_flux(), random_flux()
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    call = {"num_inference_steps": 8}
    own = [Peer("same", call=call, pipeline=same), Peer("cached", call=call, pipeline=cached)]
    results, images = experiment.run([plain(8), *own], title="test", baseline="8 steps")
    assert [image.tobytes() for image in images["same"]] == [image.tobytes() for image in images["8 steps"]]
    assert results.flops_ratio("same") == 1 and results.flops_ratio("cached") > 1
    assert results.rival("8 steps") is None and results.rival("same") in ("8 steps", None)
    assert from_json(results.to_json()) == results


def test_prompts_that_do_not_fill_a_round_are_refused(experiment: Experiment) -> None:
    with pytest.raises(ValueError, match="rounds of 3"):
        Experiment(experiment.pipeline, PROMPTS, batch=3)
