"""A second process finds what the first one built, and gives the same picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pieces
import pytest
import torch

from fastdit import AOT, Compile, accelerate
from fastdit.testing import EngineContract, generate

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
import fastdit
from fastdit.testing import EngineContract, generate
pipeline, call = EngineContract().pipeline()
fast = fastdit.accelerate(pipeline, fastdit.Stack.from_json(json.loads(sys.argv[1])))
torch.save(generate(fast, call), sys.argv[2])
print(json.dumps([[build.kept, build.seconds] for build in fast.fastdit.workshop.builds]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "engine",
    [
        Compile(),
        Compile(packed=True),
        AOT(),
    ],
    ids=lambda engine: engine.describe(),
)
def test_it_builds_nothing_and_gives_the_same_picture(engine: Any, tmp_path: Path) -> None:
    for other in (AOT(), Compile()):  # what the process holds of other engines
        pieces.run(accelerate(pieces.model(), [other]), pieces.inputs())
    pipeline, call = EngineContract().pipeline()
    fast = accelerate(pipeline, [engine])
    expected = generate(fast, call)
    stack = json.dumps(fast.fastdit.stack.to_json())
    arguments = [sys.executable, "-c", SCRIPT, stack, str(tmp_path / "latents.pt")]
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [*filter(Path.is_file, temporary.rglob("*"))] == [], (
        "what a compiler finds in a folder that it shares, it runs"
    )
    assert [kept for kept, _ in json.loads(done.stdout.splitlines()[-1])] == [True, True], done.stderr
    assert torch.equal(torch.load(tmp_path / "latents.pt"), expected)
