"""Experiments as TOML files: what is read, and that every slip is told with its file and line before a model loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdit import InvalidConfig, ProgressiveResolution, Stack, TeaCache
from fastdit.bench.experiment import Experiment
from fastdit.bench.source import Source
from fastdit.bench.toml import read_experiment

GOOD = """\
pipelines = ["mini", { name = "mini:sd3", dtype = "bfloat16" }]
sizes = [256, [256, 512]]
prompts = ["an apple", "two boats"]
seeds = [0, 1]

[stacks]
cache = "TeaCache .25"
both = "ProgressiveResolution, TeaCache .25"
"""


def read(tmp_path: Path, text: str) -> Experiment:
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return read_experiment(path)


def test_an_experiment_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == Experiment(
        pipelines=(Source("mini"), Source("mini:sd3", dtype="bfloat16")),
        stacks={"cache": Stack([TeaCache(0.25)]), "both": Stack([ProgressiveResolution(), TeaCache(0.25)])},
        prompts=("an apple", "two boats"),
        seeds=(0, 1),
        sizes=((256, 256), (256, 512)),
    )


def test_prompts_may_be_a_file_beside_it_and_stacks_a_list(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("an apple\n\ntwo boats\n")
    made = read(tmp_path, 'pipelines = ["mini"]\nprompts = "prompts.txt"\nstacks = ["Interval 2"]\n')
    assert made.prompts == ("an apple", "two boats") and list(made.stacks) == ["Interval 2"]


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("seeds", "seedz", 4, "did you mean seeds"),
        ("seeds = [0, 1]", "seeds = [0, -1]", 4, "seeds"),
        ("seeds = [0, 1]", "seeds = 3", 4, "seeds"),
        ('TeaCache .25"\nboth', 'TeeCache .25"\nboth', 7, r"'cache': there is nothing called 'TeeCache'; did you mean"),
        ("ProgressiveResolution,", "ProgressiveResolution, RALU,", 8, "'both'.*schedule"),
        ("mini:sd3", "mini:sd4", 1, "embedded"),
        ("dtype", "dtyp", 1, "did you mean dtype"),
        ("bfloat16", "bfloat17", 1, "dtype"),
        ("[256, 512]", "[250, 512]", 2, "multiples of 8"),
        ("[256, 512]", "[272, 512]", 8, "both can't make pictures"),
        ("[256, 512]", '"large"', 2, "a size is"),
        ('["an apple", "two boats"]', "[]", 3, "at least one"),
        ('["an apple", "two boats"]', '["an apple", " "]', 3, "not empty"),
        ('["an apple", "two boats"]', '"missing.txt"', 3, "can't be read"),
        ("[stacks]", "[stacks", 6, "no TOML"),
        ("sizes", "rounds = 1\nsizes", 2, "rounds"),
    ],
)
def test_a_slip_is_told_with_its_file_and_line(tmp_path: Path, old: str, new: str, line: int, told: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidConfig, match=rf"experiment\.toml:{line}: .*{told}"):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(InvalidConfig, match=r"missing\.toml: can't be read"):
        read_experiment(Path("missing.toml"))
