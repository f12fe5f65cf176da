"""The support table tells of every pipeline what came of running it, or why it was not run."""

from __future__ import annotations

import json
import warnings

import diffusers
import pytest
from typer.testing import CliRunner

from fastdit import FirstBlockCache, Interval, accelerate
from fastdit.cli import app
from fastdit.errors import FastditWarning
from fastdit.measure.support import (
    STEPS,
    Answer,
    Support,
    _skips,
    gist,
    pipeline_classes,
    supported,
    table,
)
from fastdit.models.family import families
from fastdit.models.undescribed import BY_PIPELINE, why_not, why_not_whole
from fastdit.testing import PIPELINES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma, inside diffusers
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),  # PRX, inside diffusers
]
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".* is left out, since diffusers can't import it", FastditWarning)
    CLASSES = {cls.__name__: cls for cls in pipeline_classes()}
DESCRIBED = {name for family in families() for name in family.pipelines}


#: One family of packed tokens, one of frames, one of whole frames; all others belong to the exhaustive part.
FEW = ("FluxPipeline", "StableDiffusion3Pipeline", "WanPipeline")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.exhaustive)
        for name in sorted(DESCRIBED & set(PIPELINES) & set(CLASSES))
    ],
)
def test_every_described_pipeline_with_a_tiny_one_takes_stages_of_its_kind(name: str) -> None:
    row = supported(CLASSES[name])
    family = next(family for family in families() if name in family.pipelines)
    assert row.family == family.name
    assert row.mixed.works is family.mixes
    assert row.whole.works is True


@pytest.mark.parametrize("name", sorted(set(CLASSES) - DESCRIBED))
def test_every_other_pipeline_says_in_one_sentence_why_it_takes_none(name: str) -> None:
    for reason in (why_not(CLASSES[name]), why_not_whole(CLASSES[name])):
        assert 20 < len(reason) < 140
        assert ". " not in reason


def test_a_pipeline_that_diffusers_cannot_import_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__all__", [*diffusers.__all__, "AbsentPipeline"])
    monkeypatch.setitem(diffusers._class_to_module, "AbsentPipeline", "absent")
    with pytest.warns(FastditWarning, match="AbsentPipeline is left out.*No module named 'diffusers.absent'"):
        found = {cls.__name__ for cls in pipeline_classes()}
    assert found == set(CLASSES)


def test_no_pipeline_is_described_twice_or_given_a_reason_against_it() -> None:
    names = [name for family in families() for name in family.pipelines]
    assert len(set(names)) == len(names)
    assert not DESCRIBED & set(BY_PIPELINE)


@pytest.mark.parametrize("name", ["CosmosTextToWorldPipeline", "VisualClozePipeline"])
def test_a_pipeline_that_was_not_run_itself_is_not_said_to_work(name: str) -> None:
    row = supported(CLASSES[name])
    assert row.step_cache.works is None
    assert "its transformer takes them in a plain loop" in row.step_cache.reason


@pytest.mark.parametrize(
    ("name", "works"),
    [("GlmImagePipeline", True), ("LTX2Pipeline", True), ("StableDiffusion3ControlNetPipeline", False)],
)
def test_a_pipeline_s_own_loop_and_arguments_decide_and_not_its_transformer(name: str, works: bool) -> None:
    assert supported(CLASSES[name]).step_cache.works is works


def test_a_cache_that_skipped_less_than_it_was_asked_for_does_not_work() -> None:
    pipe, call = PIPELINES["FluxPipeline"](steps=STEPS)
    for stack, expected in ((FirstBlockCache(1e6), True), (Interval(2), False)):
        fast = accelerate(pipe, [stack])
        fast(**call)
        assert _skips(fast.fastdit.last_run) is expected


def test_a_table_numbers_its_reasons_and_gives_each_once() -> None:
    refused = Answer(False, "UnsupportedModel: ToCa(interval=3, first=1) knows nothing of Block (T.list)")
    rows = [Support(name, "T", None, Answer(False, "no plane"), *2 * [Answer(True)], refused) for name in ("A", "B")]
    text = table(rows)
    assert "| A |  | no (1) | yes | yes | no (2) |" in text
    assert "| B |  | no (1) | yes | yes | no (2) |" in text
    assert text.count("no plane") == 1
    assert text.endswith("2. ToCa knows nothing of its blocks\n")
    assert gist("plain words") == "plain words"


def test_the_command_prints_the_rows_that_were_asked_for() -> None:
    result = CliRunner().invoke(app, ["matrix", "sd3controlnetnothing"])
    assert result.exit_code == 2 and "no pipeline of the installed diffusers" in result.output
    rows = json.loads(CliRunner().invoke(app, ["matrix", "StableDiffusion3Pipeline", "--json"]).stdout)
    assert [row["pipeline"] for row in rows] == ["StableDiffusion3Pipeline"]
    assert [rows[0][level]["works"] for level in ("mixed", "whole", "step_cache", "token_cache")] == [True] * 4
