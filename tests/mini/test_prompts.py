"""The mini model's language: every scene can be said and read back, and evaluation prompts were never trained on."""

from __future__ import annotations

import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit.mini.prompts import (
    BACKGROUNDS,
    OBJECTS,
    PLACES,
    RELATIONS,
    Scene,
    held_out,
    parse,
    training,
    vocabulary,
)

singles = st.builds(
    Scene,
    st.sampled_from(OBJECTS).map(lambda name: (name,)),
    background=st.sampled_from([None, *BACKGROUNDS]),
    size=st.sampled_from([None, "small"]),
    place=st.sampled_from([None, *PLACES]),
)
pairs = st.builds(
    Scene,
    st.lists(st.sampled_from(OBJECTS), min_size=2, max_size=2, unique=True).map(tuple),
    background=st.sampled_from([None, *BACKGROUNDS]),
    relation=st.sampled_from(RELATIONS),
)


@given(st.one_of(singles, pairs))
def test_a_scene_survives_being_said_and_read(scene: Scene) -> None:
    assert parse(scene.prompt()) == scene
    assert set(scene.prompt().split()) <= set(vocabulary())


def test_grapes_have_no_article_and_stay_on_their_side_of_the_training() -> None:
    scene = Scene(("tree", "grapes"), relation="above")
    assert scene.prompt() == "a tree above grapes"
    assert parse("a tree above a grapes") == scene == parse("a tree above grapes")
    assert Scene(("grapes",), size="small").prompt() == "small grapes"
    said = "a grapes on the left on a pink background"
    assert parse(said).held_out == (zlib.crc32(said.encode()) % 8 == 0)


@pytest.mark.parametrize("prompt", ["", "a unicorn", "an apple on a purple", "an apple apple", "apple"])
def test_words_of_another_language_are_refused(prompt: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse(prompt)


def test_evaluation_prompts_are_fixed_and_were_kept_out_of_training() -> None:
    prompts = held_out(200, 3)
    assert prompts == held_out(200, 3) != held_out(200, 4)
    assert all(parse(prompt).held_out for prompt in prompts)
    assert sum(parse(prompt).kind == "pair" for prompt in prompts) == 50


def test_prompts_for_calibration_are_fixed_and_are_those_of_training() -> None:
    prompts = training(40, 3, background=True)
    assert prompts == training(40, 3, background=True) != training(40, 4, background=True)
    assert not any(parse(prompt).held_out for prompt in prompts)
    assert all(parse(prompt).background for prompt in prompts)
    assert sum(parse(prompt).kind == "pair" for prompt in prompts) == 10


def test_importing_the_mini_model_s_language_imports_no_torch() -> None:
    code = "import sys, fastdit.mini, fastdit.mini.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
